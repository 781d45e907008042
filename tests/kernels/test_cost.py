"""What calls cost: the formulas of the benchmarks, found again from the arguments alone."""

from typing import Any

import pytest
import torch

from miss.benchmarks import suite
from miss.benchmarks.cases import Case
from miss.kernels import registry
from miss.kernels.cost import Cost, cost, known
from miss.kernels.registry import Impl, Op

CPU = torch.device("cpu")
EACH = 6  # cases of an operation: one by one and in batches, with and without what may be added


def _few() -> dict[str, Case]:
    counts: dict[str, int] = {}
    chosen = {}
    for case, _ in suite.select((), ("bfloat16",), ("small",), CPU):
        counts[case.op] = counts.get(case.op, 0) + 1
        if known(case.op) and counts[case.op] <= EACH:
            chosen[case.label] = case
    return chosen


CASES = _few()
SMALL_TERMS = 0.12  # of a narrow matrix: biases, scales and lengths, which the benchmarks leave out


def counted(case: Case) -> Cost:
    """The cost of the case's own operation within its call."""
    found: list[Cost] = []

    def wrap(op: Op, impl: Impl, args: tuple[Any, ...], run: Any) -> Any:
        result = run()
        if op.name == case.op:
            found.append(cost(op.name, args, result))
        return result

    inputs = case.make(torch.Generator().manual_seed(0))
    with torch.no_grad(), registry.around(wrap):
        (case.bind(*inputs) if case.bind else lambda: case.call(*inputs))()
    return found[0]


@pytest.mark.parametrize("label", CASES)
def test_costs_are_those_of_the_benchmarks(label: str) -> None:
    case, found = CASES[label], counted(CASES[label])
    assert found.flops == pytest.approx(case.flops, rel=1e-9)
    assert found.reads == pytest.approx(case.reads, rel=SMALL_TERMS)
    assert found.writes == pytest.approx(case.writes, rel=SMALL_TERMS)
    if "/" in case.dtype:
        assert (found.kind == "int8") == case.dtype.endswith("w8a8")


def test_every_operation_of_answering_has_a_case() -> None:
    """Held against a benchmark above, or in a test of its own below; a look-up is bytes alone."""
    unheld = {name for name in registry.OPS if known(name)} - {case.op for case in CASES.values()}
    assert unheld == {"quant_embedding", "quantise_rows", "attention_varlen", "decode_attention_append"}


def test_an_append_costs_the_attention_and_the_new_rows() -> None:
    q, cache = torch.randn(3, 2, 32), torch.randn(4, 9, 2, 32)
    slots, positions = torch.tensor([1, 1, 3], dtype=torch.int32), torch.tensor([4, 5, 0], dtype=torch.int32)
    found = cost("decode_attention_append", (q, q, q, cache, cache, slots, positions, 0.2), q)
    alone = cost("decode_attention", (q, cache, cache, slots, positions + 1, 0.2), q)
    assert (found.flops, found.reads) == (alone.flops, alone.reads)
    assert found.writes == alone.writes + 2 * q.nbytes


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_different_lengths_cost_their_own_pairs(causal: bool) -> None:
    lengths, heads, width = [3, 1, 7], 2, 32
    q = torch.randn(sum(lengths), heads, width)
    offsets = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    found = cost("attention_varlen", (q, q, q, offsets, 7, causal), q)
    assert (found.flops, found.reads) == (4.0 * pairs * heads * width, 3 * q.nbytes + offsets.nbytes)


def test_quantising_reads_numbers_and_writes_bytes() -> None:
    x = torch.randn(5, 64)
    found = cost("quantise_rows", (x,), (x.to(torch.uint8), x[:, 0].contiguous()))
    assert (found.reads, found.writes) == (x.nbytes, 5 * 64 + 5 * 4)


def test_an_unknown_operation_is_named() -> None:
    with pytest.raises(ValueError, match="no cost is known of unheard_of; known: patch_embed"):
        cost("unheard_of", (), None)


def test_around_wraps_inner_runs_and_ends_with_its_block() -> None:
    from miss.kernels.layer_norm import layer_norm

    names: list[str] = []

    def wrap(op: Op, impl: Impl, args: tuple[Any, ...], run: Any) -> Any:
        names.append(op.name)
        return run()

    x, ones = torch.randn(3, 8), torch.ones(8)
    with torch.no_grad(), registry.around(wrap):
        inside = layer_norm(x, ones, ones)
    outside = layer_norm(x, ones, ones)
    assert names == ["layer_norm"]
    assert torch.equal(inside, outside)
