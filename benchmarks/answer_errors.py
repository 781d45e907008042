"""How wrong peers and our precisions are: first-token logits against float64, answers against fp32 and against truth.

Knows the graphs of `peers/graphs.py` (which, in float64, are the truth) and SLAKE; does not know how fast anything is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miss.benchmarks.answer_models import Model, judged_jobs
from miss.benchmarks.peers.graphs import Cross, Question, Step, Vision
from miss.benchmarks.peers.job import Job
from miss.benchmarks.peers.process import PeerError, PeerProcess
from miss.engine.data.processor import Processor
from miss.engine.data.samples import Sample
from miss.engine.evaluation.protocols import judge
from miss.models.weights import read_checkpoint


@torch.no_grad()
def truth(checkpoint: Path, job: Job) -> np.ndarray:
    """float64 logits (R, V) of each answer's first token."""
    config, tensors = read_checkpoint(checkpoint)
    double, decoder = torch.float64, config.decoder
    rows, length = job.ids.shape
    asked = torch.from_numpy(job.ids).view(len(job.pixels), -1, length)
    image = Vision(config, tensors, double)(torch.from_numpy(job.pixels))
    states = Question(config, tensors, double)(image, asked, torch.zeros(asked.shape, dtype=double))
    cross = Cross(config, tensors, double)(states)
    width = decoder.hidden_size // decoder.num_heads
    empty = [torch.zeros(rows, decoder.num_heads, 0, width, dtype=double) for _ in cross]
    masks = torch.zeros(1, dtype=double), torch.zeros(rows, length, dtype=double)
    token = torch.full((rows,), config.tokens.dec)
    _, logits, _ = Step(config, tensors, double)(token, torch.zeros(1).long(), *masks, cross, empty)
    return logits.numpy()


def logit_errors(peers: Sequence[PeerProcess], checkpoint: Path, job: Job, file: Path) -> dict[str, Any]:
    """Of each peer: the largest and the mean error of the log-probabilities of its likeliest first tokens, relative to
    the largest logit's distance from the mean logit; and whether its first tokens are the truth's."""
    job.save(file)
    exact = truth(checkpoint, job)
    shifted = exact - exact.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    # [SEP], put out of reach where answers have a fixed length, is no logit of the model's.
    real = np.where(exact > -1e3, exact, np.nan)
    largest = float(np.nanmax(np.abs(real - np.nanmean(real, -1, keepdims=True))))
    found: dict[str, Any] = {}
    for peer in peers:
        try:
            peer.ask("prepare", file)
            reply = peer.ask("first", file)
        except PeerError as error:
            found[peer.entry.name] = {"failed": str(error)}
            continue
        ids = np.array(reply["ids"])
        errors = np.abs(np.array(reply["logprobs"]) - np.take_along_axis(logprobs, ids, -1)) / largest
        same = int((ids[:, 0] == exact.argmax(-1)).sum())
        figures = {"relative_max": float(errors.max()), "relative_mean": float(errors.mean())}
        found[peer.entry.name] = figures | {"first_tokens_equal": same, "questions": len(ids)}
    return found


def answers(
    peer: PeerProcess, jobs: list[tuple[Job, list[Sample]]], folder: Path, watch: Callable[[int], object]
) -> list[list[int]]:
    """Tokens of every answer, in the jobs' order."""
    found: list[list[int]] = []
    for number, (job, _) in enumerate(jobs):
        file = folder / f"judged-{number}.npz"
        if not file.exists():
            job.save(file)
        peer.ask("prepare", file)
        found += peer.ask("run", file, stamp=None)["tokens"]
        watch(len(job.texts))
    return found


def judged(
    found: dict[str, list[list[int]]], reference: str, model: Model, jobs: list[tuple[Job, list[Sample]]]
) -> dict[str, Any]:
    """Of each peer: the share of answers that are token for token the reference's, and of those that are right."""
    processor = Processor.from_folder(model.checkpoint)
    samples = [sample for _, asked in jobs for sample in asked]
    result = {}
    for name, rows in found.items():
        verdicts = [
            judge(processor.decode(row), sample.answer, sample.answer_type).exact
            for row, sample in zip(rows, samples, strict=True)
        ]
        same = [a == b for a, b in zip(rows, found[reference], strict=True)]
        result[name] = {
            "questions": len(rows),
            "accuracy": round(float(np.mean(verdicts)), 4),
            "agreement": round(float(np.mean(same)), 4),
            "reference": reference,
        }
    return result


def jobs_for(model: Model, samples: list[Sample], limit: int, num_tokens: int) -> list[tuple[Job, list[Sample]]]:
    """The questions of a split, or `limit` of them spread over it."""
    chosen = samples[:: max(1, len(samples) // limit)][:limit]
    return judged_jobs(model, chosen, num_tokens)
