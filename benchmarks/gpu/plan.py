"""What a part of the suite is told: the device, the folders, its time, and how thoroughly. Imports no torch."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from miss.benchmarks.gpu.state import ROOT


@dataclass(frozen=True)
class Plan:
    """out: the results' folder. work: what need not travel. seconds: after which nothing new is begun."""

    device: str
    quick: bool
    out: Path
    work: Path
    seconds: float = 0.0

    @property
    def evidence(self) -> Path:
        return self.out / "evidence.json"

    @property
    def kernels(self) -> Path:
        return self.out / f"kernels-{self.device}.jsonl"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def traces(self) -> Path:
        return self.work / "traces"

    def result(self, part: str) -> Path:
        return self.work / f"{part}.json"

    def environment(self) -> dict[str, str]:
        """Imports from this tree, nothing looked for on the network, and the evidence that this run has made."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "PYTHONUNBUFFERED": "1"}
        found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        found.pop("TRITON_INTERPRET", None)
        return found | ({"MISS_EVIDENCE": str(self.evidence)} if self.device == "cuda" else {})

    def flags(self) -> list[str]:
        """The plan on a command line."""
        words = ["--device", self.device, "--out", str(self.out), "--work", str(self.work)]
        return [*words, "--seconds", f"{self.seconds:.0f}", *(["--quick"] if self.quick else [])]


def python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]
