"""Cross-attention in Triton against float64, by the error rule: values and gradients; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round (here conversions truncate), races between
programs, or alignment.
"""

import pytest
import torch

from miss.kernels.cross_attention import (
    op,
    reference,
    torch_impl,
    triton_backward_impl,
    triton_impl,
    triton_tokens_impl,
)
from miss.kernels.dropout import keep_mask
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

INF = float("inf")
SEED, P = 23, 0.3
SMALL = {"BM": 16, "BN": 32, "TAIL": 16, "SPLIT": 64}
# rows of each image, (queries, keys, heads, head width), lengths
SIZES = [
    ([1, 1, 1], (1, 1, 2, 32), None),
    ([3, 0, 1, 2], (7, 17, 2, 32), [17, 5, 0, 1]),
    ([0, 5, 0, 1, 0], (5, 65, 1, 64), None),
    ([9], (20, 97, 1, 32), [81]),
    ([2, 3], (3, 130, 2, 32), [129, 64]),
    ([0, 0], (3, 5, 1, 32), None),
]


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(counts, shape, lengths, dtype, dropout_p=0.0):
    """q, strided k and v as in the one projection of all layers, and the rest of a call's arguments."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, heads, width = shape
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int().to(DEVICE)
    q = torch.randn(len(index), queries, 2, heads, width, generator=generator)[:, :, 1]
    kv = torch.randn(len(counts), keys, 3, heads, width, generator=generator)
    q, kv = q.to(DEVICE, dtype), kv.to(DEVICE, dtype)
    seed = torch.tensor(SEED) if dropout_p else None
    return [
        q,
        kv[:, :, 1],
        kv[:, :, 2],
        index,
        None if lengths is None else int32(lengths),
        width**-0.5,
        dropout_p,
        seed,
    ]


def doubled(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def floor(dtype):
    """Of bfloat16 a place: the interpreter truncates where a GPU rounds."""
    return 2e-6 if dtype == torch.float32 else 8e-3 if dtype == torch.bfloat16 else 1e-3


def check(size, dtype, dropout_p=0.0, module=triton_impl):
    args = inputs(*size, dtype, dropout_p)
    out, lse = module.kv_forward(*args)
    exact, exact_lse = reference.kv_forward(*doubled(args))
    assert_as_good_as(out, torch_impl.kv_forward(*args)[0], exact, slack=3.0, floor=floor(dtype), what="out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], atol=1e-5, rtol=1e-5)


def check_backward(size, dtype, dropout_p=0.0, backward=triton_backward_impl.kv_backward):
    args = inputs(*size, dtype, dropout_p)
    dout = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    out, lse = triton_impl.kv_forward(*args)
    exact_out, exact_lse = reference.kv_forward(*doubled(args))
    got = backward(dout, *args[:3], out, lse, *args[3:])
    low = torch_impl.kv_backward(dout, *args[:3], out, lse, *args[3:])
    exact = doubled(args)
    exact = reference.kv_backward(dout.double(), *exact[:3], exact_out, exact_lse, *exact[3:])
    for name, g, p, e in zip(("dq", "dk", "dv"), got, low, exact, strict=True):
        assert g.dtype == dtype and g.is_contiguous()
        assert_as_good_as(g, p, e, slack=3.0, floor=floor(dtype), what=name)
    return got


def force(monkeypatch, module, name, launch):
    monkeypatch.setattr(module, name, dict.fromkeys(getattr(module, name), (launch,)))


@pytest.fixture
def small(monkeypatch):
    """Blocks that make many tiles, tails and spans of few numbers."""
    force(monkeypatch, triton_impl, "LAUNCHES", Launch(SMALL, 1, 1))
    force(monkeypatch, triton_backward_impl, "DQ_LAUNCHES", Launch({"BM": 16, "BN": 32, "TAIL": 16}, 1, 1))
    force(monkeypatch, triton_backward_impl, "DKV_LAUNCHES", Launch({"BM": 16, "BN": 32}, 1, 1))


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[:2]))
def test_error_rule(size, dropout_p, small):
    check(size, torch.float32, dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_rule_of_every_table_entry(dtype, monkeypatch):
    for kind, launches in triton_impl.LAUNCHES.items():
        if (kind == "float32") == (dtype == torch.float32):
            for launch in launches:
                force(monkeypatch, triton_impl, "LAUNCHES", launch)
                check(SIZES[1], dtype)
                check(SIZES[2], dtype, P)


@pytest.mark.parametrize("dropout_p", [0.0, P])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[:2]))
def test_gradients(size, dropout_p, small):
    check_backward(size, torch.float32, dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("table", ["DQ_LAUNCHES", "DKV_LAUNCHES"])
def test_gradients_of_every_table_entry(table, dtype, monkeypatch):
    for kind, launches in getattr(triton_backward_impl, table).items():
        if (kind == "float32") == (dtype == torch.float32):
            for launch in launches:
                force(monkeypatch, triton_backward_impl, table, launch)
                check_backward(SIZES[1], dtype, P)


def test_image_of_197_keys():
    check(([2], (20, 197, 1, 64), None), torch.float32)
    check(([1], (1, 197, 1, 64), None), torch.bfloat16)
    check_backward(([2], (20, 197, 1, 64), None), torch.float32)


def test_what_has_no_reader_or_is_not_seen_takes_no_gradient(small):
    """The memory of gradients comes unset: zeros are written, not left."""
    dq, dk, dv = check_backward(([0, 2, 1], (5, 70, 1, 32), [70, 33, 0]), torch.float32)
    for unseen in (dq[2], dk[0], dv[0], dk[1, 33:], dv[1, 33:], dk[2], dv[2]):
        assert not unseen.any()


def test_gradients_are_the_same_bits_whatever_else_is_in_the_batch(small):
    q, k, v, index, lengths, *rest = inputs([2, 3, 1], (5, 70, 2, 32), [70, 33, 64], torch.float32)
    out, lse = triton_impl.kv_forward(q, k, v, index, lengths, *rest)
    together = triton_backward_impl.kv_backward(q * 2, q, k, v, out, lse, index, lengths, *rest)
    rows, one = slice(2, 5), slice(1, 2)
    alone = triton_backward_impl.kv_backward(
        q[rows] * 2, q[rows], k[one], v[one], out[rows], lse[rows], int32([0, 0, 0]), lengths[one], *rest
    )
    wanted = together[0][rows], together[1][one], together[2][one]
    assert all(map(torch.equal, alone, wanted))


def test_spans_are_a_function_of_the_keys_alone():
    launch = triton_impl.LAUNCHES["many"][0]
    assert [triton_impl.split(n, launch) for n in (1, 35, 197, 257, 577, 901)] == [
        *((64, 1), (64, 1), (256, 1), (320, 1), (320, 2), (320, 3)),
    ]


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("module", [triton_impl, triton_tokens_impl])
def test_a_text_has_one_launch_however_far_it_is_padded(module, width):
    tables = module.LAUNCHES
    launches = [
        module.launch_for("cross_attention", tables, torch.empty(1, n, 12, width, dtype=torch.bfloat16))
        for n in (3, 8, 16, 24, 32, 40)
    ]
    assert len(set(map(str, launches))) == 1


@pytest.mark.parametrize("queries", [1, 5])
def test_bitwise_the_same_whatever_rows_share_an_image(queries, small):
    size = ([1, 20, 0, 2], (queries, 131, 2, 32), [131, 33, 8, 65])
    q, k, v, index, lengths, *rest = inputs(*size, torch.float32)
    together = triton_impl.kv_forward(q, k, v, index, lengths, *rest)
    for row in (0, 1, 9, 20, 22):
        one = slice(int(index[row]), int(index[row]) + 1)
        alone = triton_impl.kv_forward(q[row : row + 1], k[one], v[one], int32([0]), lengths[one], *rest)
        assert all(torch.equal(a[0], t[row]) for a, t in zip(alone, together, strict=True))


def test_dropout_takes_the_bits_of_the_mask(small):
    """With values that are unit vectors the output is the dropped probabilities themselves."""
    q, k, v, index, *_ = inputs([2, 1], (3, 31, 2, 32), None, torch.float32)
    k = torch.zeros_like(k)
    v = torch.eye(32, device=DEVICE)[:31, None].expand(2, 31, 2, 32)
    out, _ = triton_impl.kv_forward(q, k, v, index, None, 1.0, P, torch.tensor(SEED))
    kept = keep_mask(torch.tensor(SEED), (3, 2, 3, 31), P, out.device)
    assert torch.equal(out[..., :31].transpose(1, 2) > 0, kept)
    torch.testing.assert_close(out[..., :31].transpose(1, 2), kept.float() / 31 / (1 - P))


def test_nan_and_infinity_among_the_visible(small):
    q, k, v, index, lengths, *rest = inputs([1, 1, 1, 1], (2, 80, 1, 32), [70, 70, 70, 70], torch.float32)
    q = q.abs()
    k[0, 2], k[1, 69], k[2], k[3, 1] = float("nan"), INF, -INF, -INF
    out = triton_impl.kv_forward(q, k, v, index, lengths, *rest)[0]
    assert out[:3].isnan().all()
    torch.testing.assert_close(out[3], reference.kv_forward(q, k, v, index, lengths, *rest)[0][3])


@pytest.mark.parametrize("index", [[1, 0, 1], [0, 5, 9], [-3, 0, 1]], ids=str)
def test_a_wrong_index_stays_inside_its_plan(index):
    plan = triton_impl.plan(int32(index), 2, 5, 16)
    images, first = plan.tiles.unbind(1)
    assert plan.bound == 2 and set(images.tolist()) <= {-1, 0, 1} and plan.first_rows.clamp(0, 3).equal(plan.first_rows)


def test_the_plan_of_many_images():
    counts = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0))
    index = torch.repeat_interleave(torch.arange(300), counts).int().to(DEVICE)
    plan = triton_impl.plan(index, 300, 7, 16)
    wanted = [(i, m) for i, c in enumerate(counts.tolist()) for m in range(0, 7 * c, 16)]
    tiles = [tuple(t) for t in plan.tiles.tolist()]
    assert tiles[: len(wanted)] == wanted and all(image == -1 for image, _ in tiles[len(wanted) :])
    assert plan.first_rows.tolist() == [0, *counts.cumsum(0).tolist()] and len(tiles) == plan.bound


@pytest.mark.parametrize("bug", ["mask", "tail", "scale", "image", "span", "dropout"])
def test_planted_bugs_are_seen(bug, small, monkeypatch):
    class Wrong:
        @staticmethod
        def kv_forward(q, k, v, index, lengths, scale, dropout_p, seed):
            if bug == "mask":
                lengths = None
            if bug == "tail":
                lengths = lengths - 1
            if bug == "scale":
                scale = scale * 1.01
            if bug == "image":
                index = torch.cat([index[:1], index[:-1]])
            if bug == "span":
                monkeypatch.setattr(triton_impl, "split", lambda keys, launch: (64, 1))
            if bug == "dropout":
                seed = seed + 1
            return triton_impl.kv_forward(q, k, v, index, lengths, scale, dropout_p, seed)

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[4], torch.float32, P if bug == "dropout" else 0.0, Wrong)


@pytest.mark.parametrize("bug", ["mask", "scale", "image", "dropout", "delta"])
def test_planted_bugs_in_gradients_are_seen(bug, small):
    def wrong(dout, q, k, v, out, lse, index, lengths, scale, dropout_p, seed):
        if bug == "mask":
            lengths = lengths + 1
        if bug == "scale":
            scale = scale * 1.01
        if bug == "image":
            index = torch.cat([index[:1], index[:-1]])
        if bug == "dropout":
            seed = seed + 1
        if bug == "delta":
            out = out * 0.99
        return triton_backward_impl.kv_backward(dout, q, k, v, out, lse, index, lengths, scale, dropout_p, seed)

    with pytest.raises(AssertionError, match="error"):
        check_backward(([2, 3], (3, 70, 2, 32), [65, 33]), torch.float32, P if bug == "dropout" else 0.0, wrong)


def test_the_table_says_what_is_not_taken():
    limits = next(i.limits for i in op.FORWARD.impls if i.name == "triton")
    q, k, v, *rest = inputs(*SIZES[1], torch.float32)
    assert limits(q, k, v, *rest) is None
    assert "32 or 64 wide" in limits(q[..., :16], k[..., :16], v[..., :16], *rest)
    assert "one dtype" in limits(q, k.bfloat16(), v, *rest)
    assert "scale" in limits(q, k, v, *rest[:2], -1.0, *rest[3:])
    limits = next(i.limits for i in op.BACKWARD.impls if i.name == "triton")
    assert limits(q, q, k, v, q, q, *rest) is None
    assert "one dtype" in limits(q.double(), q, k, v, q, q, *rest)
