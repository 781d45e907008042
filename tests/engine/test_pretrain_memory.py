"""What `--dry-run` says of memory: measured passes, DeepSpeed's own estimates, tensors that engines really hold."""

import dataclasses
import importlib.util
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch import nn

from miss.engine.training.pretrain_memory import rank_memory
from miss.engine.training.pretrain_pass import Pass, give_back, measured, most_resident_bytes, resident_bytes
from miss.engine.training.pretrain_plan import STAGES, Setting, Sizes

needs_zero = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
SIZES = Sizes(40_000_000, 40_000_000, 10_000_000, 10_000_000, 20_000_000, 30_000_000, 0, 5000, 16)


def a_pass_counts_large_blocks_and_what_stays_in_the_heap():
    """Four layers without bias over many rows: inputs of 40 MB, of which the backward pass needs three, and gradients;
    then so many rows that all blocks are small and the heap keeps them."""
    width = 320
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    for rows, large in ((32_768, True), (8_192, False)):
        x = torch.randn(rows, width)
        found = measured(lambda x=x: model(x).square().sum(), model)
        one = rows * width * 4
        # layers 2 to 4 keep their inputs, the square its own; the backward pass has its gradient and the next beside
        assert (4 * one <= found.large(0) <= 7 * one) if large else found.large(0) == 0
        assert found.curve[-1] == (0, 0) and found.large(1.0) == found.large(0.0), "small gradients are the heap's"
        assert large or 3 * one <= found.heap <= 15 * one, "with gaps"
        assert 5e7 < found.process < resident_bytes() <= most_resident_bytes()
        assert all(p.grad is None for p in model.parameters())


def a_large_gradient_stays_where_it_is():
    table = nn.Linear(3000, 3000, bias=False)
    x = torch.randn(2, 3000)
    found = measured(lambda: table(x).sum(), table)
    assert found.curve[-1] == (0, 4 * 9_000_000) and found.large(1.0) >= 4 * 9_000_000


def what_is_freed_is_given_back():
    give_back()
    before = resident_bytes()
    held = [torch.ones(100_000) for _ in range(100)]
    assert resident_bytes() - before > 3e7
    del held
    give_back()
    assert resident_bytes() - before < 1e7


@pytest.fixture(scope="module")
def alone():
    """A process without other tests' tensors, which may be larger than what of them is in memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    "check",
    [
        a_pass_counts_large_blocks_and_what_stays_in_the_heap,
        a_large_gradient_stays_where_it_is,
        what_is_freed_is_given_back,
    ],
)
def test_memory_of_a_process(alone, check):
    alone.submit(check).result(timeout=120)


def states(terms, *names):
    return sum(terms[name] for name in names)


@needs_zero
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_where_deepspeed_s_estimates_are_true_they_are_ours(ranks):
    """Halves: weights, float32 masters, moments and gradients. At stage 2 they also count the halves' own gradients,
    which a bucket holds here; at stage 3 the largest layer, where here all may stay gathered."""
    from miss.engine.training.zero import estimates

    says = estimates(SIZES.total, SIZES.largest, ranks, "cpu")
    setting, one = Setting(ranks, bf16=True), Pass(((0, 0), (10**9, 0), (0, 4 * SIZES.large)), 7, 900)
    for stage in ("zero 2", "zero 3"):
        when, terms = rank_memory(SIZES, stage, setting, one)
        assert when == "backward"
        held = states(terms, "weights", "masters", "moments", "gradients")
        own = says[stage] - (4 * SIZES.largest if stage == "zero 3" else 2 * SIZES.trained // ranks)
        assert held == pytest.approx(own, abs=8)


def test_every_term_is_where_it_belongs():
    """One rank's whole float32 against two ranks': what is sharded, what is doubled, and when it is fullest."""
    number, end = 4 * SIZES.total, (0, 4 * SIZES.large)
    small, large = Pass(((0, 0), end), 70, 900), Pass(((0, 0), (10**10, 0), end), 70, 900)
    found = {
        (stage, ranks): rank_memory(SIZES, stage, Setting(ranks, library=11), small)
        for stage in STAGES
        for ranks in (1, 2)
    }
    assert found["plain", 1][0] == "saving" and found["plain", 1][1]["saved"] == 2 * number - 70
    assert found["zero 3", 2][1]["weights"] == number // 2 and found["zero 3", 1][1]["copies"] == number
    assert found["zero 1", 2][1]["moments"] == number == found["plain", 2][1]["moments"] // 2
    for (stage, _), (_, terms) in found.items():
        assert terms["process"] == (900 if stage == "plain" else 911) and terms["twin"] == 4 * SIZES.twin
        assert terms["masters"] == 0 or stage in STAGES[2:]
        assert terms["heap"] == 70
    when, terms = rank_memory(SIZES, "zero 3", Setting(2), large)
    assert (when, terms["gathered"], terms["large"]) == ("backward", number, 10**10)
    assert rank_memory(SIZES, "zero 3", Setting(1), large)[1]["gathered"] == 0
    one, other = (rank_memory(SIZES, "plain", dataclasses.replace(Setting(1), eight_bits=b), large)[1] for b in (0, 1))
    assert other["moments"] < 0.26 * one["moments"]
