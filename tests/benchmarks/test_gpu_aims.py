"""The cases of the aims on a GPU, at tiny sizes: every peer that can run here is right, gradients too."""

import pytest
import torch

from miss.benchmarks.cases import Settings
from miss.benchmarks.gpu import aims
from miss.benchmarks.gpu.summary import AIMS, Results
from miss.benchmarks.harness import measure

CPU = torch.device("cpu")


class Flat:
    """Ceilings that take no time."""

    def rate(self, kind: str) -> float:
        return 1e12

    def bandwidth(self, kind: str, nbytes: int | None = None) -> float:
        return 1e11


COUNTS = {"attention": 5, "cross_attention": 2, "cross_entropy": 1, "contrastive": 1, "layer_norm": 3}


@pytest.mark.parametrize("folder", list(aims._CASES))
def test_every_case_runs_and_is_right(folder):
    cases = list(aims.cases(folder, (torch.float32,), CPU, aims.SIZES[aims.TINY]))
    assert len(cases) == COUNTS[folder]
    for case in cases:
        result = measure(case, "warm", Settings(CPU, 2), Flat())  # type: ignore[arg-type]
        names = {row.implementation for row in result.rows}
        assert not result.refused and "torch" in names
        here = {peer.name for peer in case.peers if peer.missing is None}
        assert here <= names and all("CUDA" in p.missing or "installed" in p.missing for p in case.peers if p.missing)


def test_the_aims_find_their_rows_by_the_shapes_that_the_cases_have():
    """Names alone: at full size nothing is computed. Ours take 1 ms, all others 2."""
    lines = []
    for folder in aims._CASES:
        for case in aims.cases(folder, (torch.bfloat16,), CPU):
            names = ["triton", "torch", *(peer.name for peer in case.peers)]
            base = {"record": "row", "op": case.op, "shape": case.shape, "dtype": case.dtype}
            lines += [  # from a cache at twice the rate of memory
                base
                | {"implementation": n, "median_ms": 1 + (n != "triton"), "ours": n == "triton", "cache": cache}
                | {"gbps": 2000.0 if cache == "cold" else 8000.0}
                for n in names
                for cache in case.caches
            ]
    ceilings = {"machine": {"result": {"ceilings": {"copy_gbps": 4000.0}}}}
    state = {"device": "cuda", "quick": False, "parts": ceilings}
    results = Results(state, lines, {})
    values = {aim.name: aim.value(results) for aim in AIMS[:13]}
    assert values.pop("layer norm, share of copying") == values.pop("layer norm's gradient, share of copying") == 0.5
    assert set(values.values()) == {2.0}, values
