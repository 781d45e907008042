"""Which peers there are, what each needs, and which of ours it is held against.

Knows names and packages; imports no peer before it is asked for.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from miss.models.config import did_you_mean


@dataclass(frozen=True)
class Entry:
    """name: as on the command line. precision: fp32, bf16 or int8. packages: what it imports. extra: what installs it.

    against: the precision of ours that its ratio is stated for.
    """

    name: str
    module: str
    variant: str
    precision: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    @property
    def ours(self) -> bool:
        return self.module == "miss_engine" and not self.variant.startswith(("torch-", "nographs-"))

    @property
    def alone(self) -> bool:
        """Whether it is measured in a group of its own, the last: it compiles for minutes, which others need not wait
        for."""
        return self.variant.startswith("compiled-")

    def misses_device(self, device: str) -> str | None:
        """Why it cannot run on a device; None where it can."""
        if device == "cpu" or (self.module in ("hugging_face", "miss_engine") and self.precision != "int8"):
            return None
        return f"is measured on the CPU alone, not on {device}"

    @property
    def against(self) -> str:
        return f"miss-{self.precision}"

    def missing(self) -> str | None:
        """What to install where it cannot run here; None where it can."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return f"not installed: {', '.join(absent)}; pip install 'miss-engine[{self.extra}]'"

    def load_module(self) -> Any:
        return importlib.import_module(f"miss.benchmarks.peers.{self.module}")


_HF = (("transformers",), "peer-hf")
_ORT = (("onnxruntime", "onnx", "onnxscript"), "peer-onnxruntime")
_OV = (("openvino", "onnx", "onnxscript"), "peer-openvino")
_NNCF = (("openvino", "nncf", "onnx", "onnxscript"), "peer-openvino")
OURS = tuple(Entry(f"miss-{p}", "miss_engine", p, p) for p in ("fp32", "bf16", "int8"))
PEERS = (
    Entry("hf-fp32", "hugging_face", "fp32", "fp32", *_HF),
    Entry("hf-bf16", "hugging_face", "bf16", "bf16", *_HF),
    Entry("hf-sdpa-fp32", "hugging_face", "sdpa-fp32", "fp32", *_HF),
    Entry("hf-sdpa-bf16", "hugging_face", "sdpa-bf16", "bf16", *_HF),
    Entry("hf-compiled-fp32", "hugging_face", "compiled-fp32", "fp32", *_HF),
    Entry("hf-compiled-bf16", "hugging_face", "compiled-bf16", "bf16", *_HF),
    Entry("torch-int8", "hugging_face", "int8", "int8", *_HF),
    Entry("onnxruntime-fp32", "onnxruntime", "fp32", "fp32", *_ORT),
    Entry("onnxruntime-int8", "onnxruntime", "int8", "int8", *_ORT),
    Entry("openvino-bf16", "openvino", "bf16", "bf16", *_OV),
    Entry("openvino-int8", "openvino", "int8", "int8", *_NNCF),
    Entry("openvino-wint8", "openvino", "wint8", "int8", *_NNCF),
    Entry("miss-torch-fp32", "miss_engine", "torch-fp32", "fp32"),
    Entry("miss-torch-bf16", "miss_engine", "torch-bf16", "bf16"),
    Entry("miss-nographs-bf16", "miss_engine", "nographs-bf16", "bf16"),
)
ON_GPU = ("hf-bf16", "hf-sdpa-bf16", "hf-compiled-bf16", "miss-torch-bf16", "miss-nographs-bf16")  # the group `gpu`
HEADLINE = ("hf-fp32", "torch-int8", "onnxruntime-fp32", "onnxruntime-int8", "openvino-bf16", "openvino-int8")
ENTRIES = {entry.name: entry for entry in (*OURS, *PEERS)}


def chosen(names: tuple[str, ...], device: str = "cpu") -> tuple[list[Entry], dict[str, str]]:
    """(peers that can run, why the others cannot) for names, `all`, `headline`, `gpu` or `none`, without ours.

    Raises:
        ValueError: a name that is not known, with those that are.
    """
    wanted: list[str] = []
    for name in names:
        groups = {"all": [peer.name for peer in PEERS], "headline": list(HEADLINE), "gpu": list(ON_GPU), "none": []}
        if name not in groups and name not in ENTRIES:
            known = [*groups, *ENTRIES]
            raise ValueError(f"--peers: got {name}{did_you_mean(name, known)}; known: {', '.join(known)}")
        wanted += [n for n in groups.get(name, [name]) if n not in wanted]
    entries = [ENTRIES[name] for name in wanted if not ENTRIES[name].ours]
    absent = {entry.name: reason for entry in entries if (reason := entry.misses_device(device) or entry.missing())}
    return [entry for entry in entries if entry.name not in absent], absent
