"""The four graphs as ONNX files, made once for a checkpoint and kept.

Knows torch.onnx and the graphs; does not know who reads the files. Needs the packages onnx and onnxscript.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from miss.benchmarks.peers.graphs import GRAPHS
from miss.benchmarks.peers.greedy import places
from miss.models.config import MissConfig
from miss.models.files import atomic_folder
from miss.models.weights import read_checkpoint

_OPSET = 20  # the first with exact GELU as one operation


def onnx_files(checkpoint: Path, work: Path) -> Path:
    """The folder of vision.onnx, question.onnx, cross.onnx and step.onnx."""
    folder = work / "onnx"
    if not folder.is_dir():
        config, tensors = read_checkpoint(checkpoint)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as temporary:
            for name in GRAPHS:
                graph = GRAPHS[name](config, tensors).eval()
                _export(graph, *_signature(name, config), temporary / f"{name}.onnx")
    return folder


def _export(
    graph: torch.nn.Module, example: Any, dynamic: Any, inputs: list[str], outputs: list[str], path: Path
) -> None:
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=inputs,
            output_names=outputs,
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def _signature(name: str, config: MissConfig) -> tuple[Any, Any, list[str], list[str]]:
    """(example inputs, which dimensions may vary, names of inputs, names of outputs)."""
    vision, decoder = config.vision, config.decoder
    side, heads, width = config.preprocess.image_size, decoder.num_heads, decoder.hidden_size // decoder.num_heads
    tokens, kept = (side // vision.patch_size) ** 2 + 1, places(decoder.num_layers)
    sizes = {"images": 2, "questions": 3, "length": 7, "rows": 4, "answer": 5}  # of the example, all different
    most = {"images": 4096, "questions": 4096, "length": config.encoder.max_positions, "rows": 1 << 16, "answer": 512}
    images, questions, length, rows, answer = (torch.export.Dim(n, max=most[n]) for n in sizes)
    i, q, t, r, a = sizes.values()
    caches = [torch.randn(r, heads, n, width) for n in (t, a) for _ in kept]
    if name == "vision":
        return (torch.zeros(i, side, side, 3, dtype=torch.uint8),), ({0: images},), ["pixels"], ["image"]
    example: Any
    if name == "question":
        asked = {0: images, 1: questions, 2: length}
        example = (torch.randn(i, tokens, vision.hidden_size), torch.ones(i, q, t).long(), torch.zeros(i, q, t))
        return example, ({0: images}, asked, asked), ["image", "ids", "mask"], ["states"]
    if name == "cross":
        names = [f"cross_{n}" for n in kept]
        return (torch.randn(r, t, decoder.source_width),), ({0: rows, 1: length},), ["states"], names
    plain = (torch.ones(r).long(), torch.ones(1).long(), torch.zeros(a + 1), torch.zeros(r, t))
    dynamic: Any = ({0: rows}, {}, {0: answer + 1}, {0: rows, 1: length})
    varying = ([{0: rows, 2: length} for _ in kept], [{0: rows, 2: answer} for _ in kept])
    names = ["token", "position", "self_mask", "cross_mask", *(f"{p}_{n}" for p in ("cross", "past") for n in kept)]
    example = (*plain, caches[: len(kept)], caches[len(kept) :])
    return example, (*dynamic, *varying), names, ["next", "logits", *(f"new_{n}" for n in kept)]
