"""Our own engine through its public face: `Engine.load`, `answer_many`.

Knows the engine's API and the registry's names; does not know how an answer is made. `miss-fp32`, `miss-bf16`,
`miss-int8`, and `miss-torch-fp32`, `miss-torch-bf16`: the same engine on PyTorch's rows; `miss-nographs-bf16`: without
captured graphs.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from miss.benchmarks.peers.job import TOP, Job, Output
from miss.benchmarks.rows import plain_rows
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.engine import Answer, Engine
from miss.engine.runtime.sampler import SamplingParams
from miss.kernels import registry

CACHE_BYTES = 160 << 20
STAGES = ("image", "question", "decode")


def convert(variant: str, checkpoint: Path, work: Path, calibration: list[Path]) -> None:
    pass  # it reads the checkpoint itself


def load(variant: str, checkpoint: Path, work: Path, threads: int, dynamic: bool, device: str = "cpu") -> "MissEngine":
    precision = variant.rpartition("-")[2]
    rows = plain_rows() if variant.startswith("torch-") else {}
    with registry.use(**rows):
        # Every run has new images: a large cache would be memory that is written for the first time, run by run.
        config = EngineConfig(cache_bytes=CACHE_BYTES)
        if variant.startswith("nographs-"):
            config = replace(config, graph_bytes=0)
        return MissEngine(Engine.load(checkpoint, precision, device, config), rows)


class MissEngine:
    def __init__(self, engine: Engine, rows: dict[str, str]) -> None:
        self.engine, self.rows = engine, rows

    def prepare(self, job: Job) -> None:
        pass

    def run(self, job: Job) -> Output:
        greedy = SamplingParams(num_beams=1, max_new_tokens=job.num_tokens, num_alternatives=0)
        answers = self._answers(job, greedy)
        # Each answer's seconds are its own wait: those of one batch go through the stages together.
        seconds = {stage: max(answer.seconds[stage] for answer in answers) for stage in STAGES}
        return Output([list(answer.token_ids) for answer in answers], seconds)

    def first(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        params = SamplingParams(num_beams=1, max_new_tokens=1, num_alternatives=TOP - 1)
        found = []
        for answer in self._answers(job, params):
            others = [(other.logprob, other.token_ids[0]) for other in answer.alternatives]
            found.append(sorted([(answer.logprob, answer.token_ids[0]), *others], reverse=True))
        logprobs, ids = np.moveaxis(np.array(found), -1, 0)
        return ids.astype(np.int64), logprobs

    def _answers(self, job: Job, params: SamplingParams) -> list[Answer]:
        pairs = [(job.pixels[i], text) for i, text in zip(job.image_index, job.texts, strict=True)]
        with registry.use(**self.rows):
            return list(self.engine.answer_many(pairs, params, batch_size=len(pairs)))
