"""Greedy answers by the four graphs of `graphs.py`, whoever runs them: the cache's buffers and the loop.

Knows the graphs' inputs and outputs; does not know a runtime.

Shapes: as in `graphs.py`; A answer places, L layers.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from miss.benchmarks.peers.graphs import HIDDEN
from miss.benchmarks.peers.job import Job, Output, likeliest
from miss.models.config import MissConfig


def places(num_layers: int) -> list[str]:
    """Names of a decoder's keys and values, layer by layer."""
    return [f"{part}{layer}" for layer in range(num_layers) for part in "kv"]


class Runtime(Protocol):
    """Runs one graph after another, each on arrays or on what another has left in its outputs."""

    def shape(self, shapes: dict[str, dict[str, list[int]]]) -> None:
        """Told once the shapes of every graph's inputs."""

    def images(self, pixels: np.ndarray) -> Any: ...

    def questions(self, image: Any, ids: np.ndarray, mask: np.ndarray) -> Any: ...

    def begin(self, states: Any, buffers: "Buffers") -> None:
        """Projects the states and points the step's inputs at its buffers."""

    def step(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """One step over the buffers: the next tokens (R,) and 2 * L new keys and values (R, H, 1, D)."""

    def logits(self) -> np.ndarray:
        """Of the last step, (R, V)."""


@dataclass
class Buffers:
    """What the step reads, written in place."""

    token: np.ndarray  # int64 (R,)
    position: np.ndarray  # int64 (1,)
    self_mask: np.ndarray  # float32 (A + 1,)
    cross_mask: np.ndarray  # float32 (R, T)
    past: list[np.ndarray]  # 2 * L of float32 (R, H, A, D)


class GraphPeer:
    """A peer made of the four graphs."""

    def __init__(self, config: MissConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.buffers: Buffers | None = None

    def shapes(self, job: Job) -> dict[str, dict[str, list[int]]]:
        """Every graph's input shapes for a job."""
        config, (rows, length) = self.config, job.ids.shape
        vision, decoder = config.vision, config.decoder
        heads, width = decoder.num_heads, decoder.hidden_size // decoder.num_heads
        images, side = len(job.pixels), job.pixels.shape[1]
        tokens = (side // vision.patch_size) ** 2 + 1
        asked, kept = [images, rows // images, length], places(decoder.num_layers)
        return {
            "vision": {"pixels": [images, side, side, 3]},
            "question": {"image": [images, tokens, vision.hidden_size], "ids": asked, "mask": asked},
            "cross": {"states": [rows, length, decoder.source_width]},
            "step": {
                "token": [rows],
                "position": [1],
                "self_mask": [job.num_tokens + 1],
                "cross_mask": [rows, length],
                **{f"cross_{name}": [rows, heads, length, width] for name in kept},
                **{f"past_{name}": [rows, heads, job.num_tokens, width] for name in kept},
            },
        }

    def prepare(self, job: Job) -> None:
        shapes = self.shapes(job)
        self.runtime.shape(shapes)
        step = {name: tuple(shape) for name, shape in shapes["step"].items()}
        self.buffers = Buffers(
            np.zeros(step["token"], np.int64),
            np.zeros(1, np.int64),
            np.zeros(step["self_mask"], np.float32),
            np.zeros(step["cross_mask"], np.float32),
            [np.zeros(step[f"past_{name}"], np.float32) for name in places(self.config.decoder.num_layers)],
        )

    def run(self, job: Job) -> Output:
        clock = [time.perf_counter()]
        self._encode(job, clock)
        tokens = self._decode(job.num_tokens)
        clock.append(time.perf_counter())
        laps = [b - a for a, b in zip(clock, clock[1:], strict=False)]
        return Output(tokens, dict(zip(("image", "question", "decode"), laps, strict=True)))

    def first(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        self._encode(job, [])
        self._decode(1)
        return likeliest(self.runtime.logits())

    def _encode(self, job: Job, clock: list[float]) -> None:
        buffers, runtime = self.buffers, self.runtime
        assert buffers is not None, "prepare comes first"
        image = runtime.images(job.pixels)
        clock.append(time.perf_counter())
        asked = job.ids.reshape(len(job.pixels), -1, job.ids.shape[1])
        states = runtime.questions(image, asked, np.zeros(asked.shape, np.float32))
        runtime.begin(states, buffers)
        clock.append(time.perf_counter())

    def _decode(self, num_tokens: int) -> list[list[int]]:
        buffers = self.buffers
        assert buffers is not None
        buffers.token[:], buffers.self_mask[:] = self.config.tokens.dec, HIDDEN
        buffers.self_mask[-1] = 0  # the new token's own
        rows: list[list[int]] = [[] for _ in buffers.token]
        for place in range(num_tokens):
            buffers.position[0] = place
            found, new = self.runtime.step()
            for row, token in zip(rows, found.tolist(), strict=True):
                if not row or row[-1] != self.config.tokens.sep:
                    row.append(token)
            if all(row[-1] == self.config.tokens.sep for row in rows):
                break
            buffers.token[:], buffers.self_mask[place] = found, 0
            for past, made in zip(buffers.past, new, strict=True):
                past[:, :, place] = made[:, :, 0]
        return rows
