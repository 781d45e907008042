"""The answering engine: a checkpoint that takes images and questions and gives answers.

Knows checkpoints, images, text and batches grouped by image; does not know HTTP, training or how an operation runs.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miss.engine.data.images import ImageSource, decode_image
from miss.engine.data.processor import Processor
from miss.engine.runtime.generate import Generated, generate
from miss.engine.runtime.loading import CHECKPOINTS, find_checkpoint, load_model
from miss.engine.runtime.sampler import SamplingParams
from miss.engine.runtime.search import Hypothesis
from miss.models.vqa import MissVQA
from miss.models.weights import LoadReport

__all__ = ["CHECKPOINTS", "Alternative", "Answer", "Engine", "Image", "find_checkpoint"]

Image = str | Path | bytes | np.ndarray | ImageSource
"""A path, encoded bytes, decoded pixels uint8 (H, W, 3), or an entry of a packed data set."""


@dataclass(frozen=True)
class Alternative:
    """Another answer: text, logprob, and score = exp(logprob)."""

    text: str
    score: float
    logprob: float
    token_ids: list[int]
    beam_score: float | None = None


@dataclass(frozen=True)
class Answer:
    """An answer and how sure the model was.

    score: exp(logprob), the probability of exactly this token sequence.
    logprob: sum of the generated tokens' log-probabilities, the closing [SEP] included, under the full softmax.
    token_ids: the generated tokens; the last is [SEP] unless max_new_tokens ran out first (`finished` is False then).
    alternatives: other answers, best first.
    seconds: image, question, decode, total; in a batch, this answer's equal share of its batch.
    warnings: what the caller should know (a question that was cut, an image with burned-in text).
    """

    text: str
    score: float
    logprob: float
    token_ids: list[int]
    alternatives: list[Alternative]
    seconds: dict[str, float]
    finished: bool = True
    beam_score: float | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine:
    """A loaded model and its processor: `Engine.load(path).answer(image, question)`."""

    def __init__(
        self, model: MissVQA, processor: Processor, name: str = "miss", report: LoadReport | None = None
    ) -> None:
        self.model, self.processor, self.name, self.report = model.eval(), processor, name, report
        self.device = next(model.parameters()).device
        self.load_seconds = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the form in which the checkpoint runs."""
        return () if self.report is None else self.report.notes

    @classmethod
    def load(cls, path_or_name: str | Path = "miss-small", precision: str = "auto", device: str = "cpu") -> "Engine":
        """Loads a checkpoint folder.

        Args:
            path_or_name: a folder, or the name of a checkpoint that ships with the project.
            precision: fp32, bf16, fp16, int8, or what a packed checkpoint carries; auto is fp32 on CPU (a packed form
                only where its report says that it passed the agreement gate; `notes` says so) and bf16 on CUDA.
            device: cpu, cuda, cuda:1 …

        Raises:
            ValueError: the precision is unknown, or the checkpoint is missing, damaged or does not fit its config.
        """
        start = time.perf_counter()
        folder = find_checkpoint(path_or_name)
        model, report = load_model(folder, precision, device)
        engine = cls(model, Processor.from_folder(folder), model.config.name, report)
        engine.load_seconds = time.perf_counter() - start
        return engine

    def answer(self, image: Image, question: str, params: SamplingParams | None = None) -> Answer:
        """Answers one question. `image` is a path, encoded bytes, or decoded pixels uint8 (H, W, 3).

        Raises:
            ValueError: the image cannot be decoded, or the question is empty or far too long.
        """
        return next(self._answer_batch([(image, question)], params or SamplingParams(), on_error="raise"))

    def answer_many(
        self,
        pairs: Iterable[tuple[Image, str]],
        params: SamplingParams | None = None,
        batch_size: int = 16,
        on_error: str = "raise",
    ) -> Iterator[Any]:
        """Answers in the order of `pairs`, in bounded memory; questions of one image in a batch share its encoding.

        With `on_error="return"` a pair that cannot be served yields its ValueError in place, and the rest go on; a
        ValueError that stands in place of an image (it could not even be named) comes back so.
        """
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error: got {on_error!r}; accepted: raise, return")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}; wanted at least 1")
        rest = iter(pairs)
        while batch := list(islice(rest, batch_size)):
            yield from self._answer_batch(batch, params or SamplingParams(), on_error)

    def _answer_batch(self, pairs: list[tuple[Image, str]], params: SamplingParams, on_error: str) -> Iterator[Any]:
        start = time.perf_counter()
        results: list[Any] = [None] * len(pairs)
        images: dict[object, np.ndarray] = {}
        broken: dict[object, ValueError] = {}
        rows: list[tuple[int, object, list[int], list[str]]] = []
        for i, (image, question) in enumerate(pairs):
            try:
                if isinstance(image, ValueError):
                    raise image
                asked = self.processor.encode_question(question)
                rows.append((i, self._image(image, images, broken), asked.ids, asked.warnings))
            except ValueError as error:
                if on_error == "raise":
                    raise
                results[i] = error
        if rows:
            order = {key: n for n, key in enumerate(dict.fromkeys(row[1] for row in rows))}
            rows.sort(key=lambda row: order[row[1]])
            pixels = np.stack([images[key] for key in order])
            generated = self._generate(pixels, [order[row[1]] for row in rows], [row[2] for row in rows], params)
            total = time.perf_counter() - start
            share = {k: v / len(rows) for k, v in (generated.seconds | {"total": total}).items()}
            for (i, _, _, warnings), hypotheses in zip(rows, generated.hypotheses, strict=True):
                results[i] = self._answer(hypotheses, share, warnings, params)
        yield from results

    def _image(self, image: Image, known: dict[object, np.ndarray], broken: dict[object, ValueError]) -> object:
        """The key under which the image's pixels stand in `known`, decoding them where it is new there."""
        key: object = hashlib.sha256(_raw(image)).digest() if isinstance(image, bytes | np.ndarray) else image
        if key in broken:
            raise broken[key]
        if key not in known:
            try:
                known[key] = self.processor.image(image if isinstance(image, np.ndarray) else decode_image(image))
            except ValueError as error:
                broken[key] = error
                raise
        return key

    def _generate(
        self, pixels: np.ndarray, image_index: list[int], questions: list[list[int]], params: SamplingParams
    ) -> Generated:
        defaults = self.model.config.generation
        lengths = [len(q) for q in questions]
        ids = torch.zeros(len(questions), max(lengths), dtype=torch.int64)
        for row, q in zip(ids, questions, strict=True):
            row[: len(q)] = torch.tensor(q)
        return generate(
            self.model,
            torch.from_numpy(pixels).to(self.device),
            torch.tensor(image_index, dtype=torch.int32, device=self.device),
            ids.to(self.device),
            torch.tensor(lengths, dtype=torch.int32, device=self.device),
            params.max_new_tokens or defaults.max_new_tokens,
            params.num_beams or defaults.num_beams,
            params.num_alternatives,
        )

    def _answer(
        self, hypotheses: list[Hypothesis], seconds: dict[str, float], warnings: list[str], params: SamplingParams
    ) -> Answer:
        texts = [self.processor.decode(h.token_ids) for h in hypotheses]
        best = hypotheses[0]
        others = [
            Alternative(text, float(np.exp(h.logprob)), h.logprob, h.token_ids, h.beam_score)
            for text, h in zip(texts[1:], hypotheses[1:], strict=True)
        ]
        return Answer(
            texts[0],
            float(np.exp(best.logprob)),
            best.logprob,
            best.token_ids,
            others[: params.num_alternatives],
            dict(seconds),
            best.finished,
            best.beam_score,
            warnings,
        )


def _raw(image: bytes | np.ndarray) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"decoded pixels: got {image.dtype} {image.shape}; wanted uint8 (height, width, 3)")
    return repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
