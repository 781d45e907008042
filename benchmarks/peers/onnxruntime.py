"""ONNX Runtime on the four graphs: fp32, and int8 by its own dynamic quantisation of the products.

Knows onnxruntime; does not know other peers. `onnxruntime-fp32`, `onnxruntime-int8`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from miss.benchmarks.peers.graphs import GRAPHS
from miss.benchmarks.peers.greedy import Buffers, GraphPeer, places
from miss.benchmarks.peers.onnx_files import onnx_files
from miss.models.files import atomic_folder
from miss.models.weights import read_config


def convert(variant: str, checkpoint: Path, work: Path, calibration: list[Path]) -> None:
    plain = onnx_files(checkpoint, work)
    folder = _folder(variant, work)
    if folder.is_dir():
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with atomic_folder(folder) as temporary:
        for name in GRAPHS:
            quantize_dynamic(
                plain / f"{name}.onnx",
                temporary / f"{name}.onnx",
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )


def load(variant: str, checkpoint: Path, work: Path, threads: int, dynamic: bool) -> GraphPeer:
    config, _ = read_config(checkpoint)
    return GraphPeer(config, _Sessions(_folder(variant, work), config.decoder.num_layers, threads))


def _folder(variant: str, work: Path) -> Path:
    return work / ("onnx" if variant == "fp32" else "onnxruntime-int8")


class _Sessions:
    def __init__(self, folder: Path, num_layers: int, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self._run = {
            name: onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            ).run
            for name in GRAPHS
        }
        self._places = places(num_layers)
        self._inputs: dict[str, Any] = {}
        self._logits = np.zeros(0)

    def shape(self, shapes: dict[str, dict[str, list[int]]]) -> None:
        pass  # it takes any shape as it comes

    def images(self, pixels: np.ndarray) -> Any:
        return self._run["vision"](None, {"pixels": pixels})[0]

    def questions(self, image: Any, ids: np.ndarray, mask: np.ndarray) -> Any:
        return self._run["question"](None, {"image": image, "ids": ids, "mask": mask})[0]

    def begin(self, states: Any, buffers: Buffers) -> None:
        projected = self._run["cross"](None, {"states": states})
        self._inputs = {
            "token": buffers.token,
            "position": buffers.position,
            "self_mask": buffers.self_mask,
            "cross_mask": buffers.cross_mask,
            **{f"cross_{name}": value for name, value in zip(self._places, projected, strict=True)},
            **{f"past_{name}": value for name, value in zip(self._places, buffers.past, strict=True)},
        }

    def step(self) -> tuple[np.ndarray, list[np.ndarray]]:
        found, self._logits, *new = self._run["step"](None, self._inputs)
        return found, new

    def logits(self) -> np.ndarray:
        return self._logits
