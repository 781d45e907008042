"""Attention in Triton against float64, by the error rule, long and short forms; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, alignment, or what the
compiler makes of products with several planes (a warp a head).
"""

import dataclasses

import pytest
import torch

from miss.kernels.attention import limits, op, reference, torch_impl, triton_backward_impl, triton_impl
from miss.kernels.attention import triton_short_impl as short
from miss.kernels.attention.triton_rows_impl import Problem, edge_width, padded
from miss.kernels.dropout import as_seed, keep_mask
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

SEED, P = 17, 0.3
FORMS = {"long": "float32", "long_halves": "long", "short16": "short16", "short32": "short32", "short64": "short64"}
NAMES = ("out", "lse", "dq", "dk", "dv")
OPTIONS = {
    "all": (False, False, 0.0),
    "lengths": (True, False, 0.0),
    "causal": (False, True, 0.0),
    "every": (True, True, P),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 16 and 32, so that short sequences have full tiles and a tail; 2 heads a program, so that 3 do not fill
    them."""
    blocks = {"float32": (16, 32), "float32_keys": (32, 16), "long": (32, 16), "long_keys": (16, 32)}
    blocks |= {"long_dropout": (32, 16), "long_dropout_keys": (16, 32)}
    for module in (triton_impl, triton_backward_impl):
        for name, (rows, keys) in blocks.items():
            monkeypatch.setitem(module.LAUNCHES, name, (Launch({"BM": rows, "BN": keys}, 4, 1),))
        for name in ("short16", "short32"):
            monkeypatch.setitem(module.LAUNCHES, name, (Launch({"G": 2}, 4, 1),))


def force(monkeypatch, form):
    monkeypatch.setattr(Problem, "kind", FORMS[form])


class Triton:
    """The two modules of the row as one."""

    forward, backward = staticmethod(triton_impl.forward), staticmethod(triton_backward_impl.backward)


class Packed:
    """The same of packed sequences, its second argument of options the longest length."""

    forward = staticmethod(triton_impl.varlen_forward)
    backward = staticmethod(triton_backward_impl.varlen_backward)


class PackedReference:
    forward, backward = staticmethod(reference.varlen_forward), staticmethod(reference.varlen_backward)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def lengths_of(keys, batch):
    return int32([keys, keys // 2, 0][:batch])


def inputs(batch, queries, keys, heads, width, dtype):
    """q, k, v as views of packed projections, and an incoming gradient that is not dense."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((batch, queries, 3, heads, width), (batch, keys, 3, heads, width), (batch, heads, queries, width))
    q, kv, dout = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in sizes)
    return q[:, :, 0], kv[:, :, 1], kv[:, :, 2], dout.transpose(1, 2)


def run(module, tensors, *options):
    """out, lse and the gradients; options: lengths, causal, dropout_p, or offsets, longest, causal, dropout_p."""
    q, k, v, dout = tensors
    options = (*options[:-1], q.shape[-1] ** -0.5, options[-1], as_seed(SEED, options[-1]))
    out, lse = module.forward(q, k, v, *options)
    lse = reference.log_sum_exp(q, k, *options[:3]) if lse is None else lse
    return [out, lse, *module.backward(dout, q, k, v, out, lse, *options)]


def compare(got, low, exact, floor):
    for name, g, p, e in zip(NAMES, got, low, exact, strict=True):
        nothing = e == float("-inf")  # lse where no key is visible
        assert torch.equal(g == float("-inf"), nothing), name
        assert_as_good_as(*(t.masked_fill(nothing, 0.0) for t in (g, p, e)), floor=floor, what=name)


def check(shape, option, dtype=torch.float32, floor=3e-6):
    tensors, (short_rows, causal, dropout_p) = inputs(*shape, dtype), OPTIONS[option]
    options = (lengths_of(shape[2], shape[0]) if short_rows else None, causal, dropout_p)
    got, low = run(Triton, tensors, *options), run(torch_impl, tensors, *options)
    compare(got, low, run(reference, [t.double() for t in tensors], *options), floor)


LONG = [(3, 1, 1, 1, 32), (2, 5, 5, 2, 64), (1, 65, 65, 1, 64), (1, 64, 64, 1, 32), (2, 3, 37, 1, 32)]
SHORT = [
    *(("short16", s) for s in ((3, 1, 1, 3, 32), (2, 5, 5, 2, 64), (1, 16, 16, 1, 32))),
    *(("short32", s) for s in ((2, 17, 17, 3, 32), (1, 30, 30, 2, 64), (2, 1, 32, 1, 32))),
    *(("short64", s) for s in ((1, 37, 37, 2, 64), (2, 40, 64, 1, 32))),
]
EVERY_FORM = [("long", 37), ("short16", 13), ("short32", 29), ("short64", 37)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long(monkeypatch, shape, option):
    force(monkeypatch, "long")
    check(shape, option)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("form", "shape"), SHORT, ids=str)
def test_short(monkeypatch, form, shape, option):
    force(monkeypatch, form)
    check(shape, option)


def test_nothing_to_do():
    for shape in ((0, 5, 5, 2, 32), (2, 0, 0, 2, 32), (2, 3, 0, 2, 32)):
        tensors = inputs(*shape, torch.float32)
        for got, wanted in zip(*(run(m, tensors, None, False, 0.0) for m in (Triton, reference)), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("form", "length"), [("long_halves", 37), *EVERY_FORM[1:]])
def test_halves(monkeypatch, form, length, dtype):
    """The floor is two places of bfloat16: the interpreter truncates where a GPU rounds, for P and for out."""
    force(monkeypatch, form)
    check((2, length, length, 1, 32), "every", dtype, floor=8e-3)


def test_an_image_with_the_tables_own_tiles(monkeypatch):
    monkeypatch.undo()
    check((1, 197, 197, 1, 64), "all")
    tensors, options = inputs(1, 197, 197, 1, 64, torch.bfloat16), (None, False, 0.0)
    exact = run(reference, [t.double() for t in tensors], *options)
    compare(run(Triton, tensors, *options), run(torch_impl, tensors, *options), exact, 8e-3)


def packed_inputs(lengths, heads):
    q, k, v, dout = (t[0] for t in inputs(1, sum(lengths), sum(lengths), heads, 32, torch.float32))
    return (q, k, v, dout), int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.0), (True, 0.0), (True, P)])
@pytest.mark.parametrize(
    ("form", "lengths"),
    [
        ("long", [0, 37, 0, 1]),
        ("short16", [5, 0, 16, 1]),
        ("short32", [31, 7, 0]),
        ("short64", [40, 33]),
        ("long", [0]),
    ],
    ids=str,
)
def test_packed(monkeypatch, form, lengths, causal, dropout_p):
    force(monkeypatch, form)
    tensors, offsets = packed_inputs(lengths, 1 if form == "long" else 3)
    options = (offsets, max(lengths) + 2, causal, dropout_p)  # max_length may be more than any
    got, low = run(Packed, tensors, *options), run(PackedReference, tensors, *options)
    compare(got, low, run(PackedReference, [t.double() for t in tensors], *options), 3e-6)


@pytest.mark.parametrize(("form", "length"), EVERY_FORM)
def test_a_row_does_not_depend_on_its_batch(monkeypatch, form, length):
    """Bit by bit, in a padded batch and packed."""
    force(monkeypatch, form)
    lengths = [length, 1, length // 2]
    tensors = inputs(3, length, length, 1, 32, torch.float32)
    together = run(Triton, tensors, int32(lengths), True, 0.0)
    for row, count in enumerate(lengths):
        one = slice(row, row + 1)
        alone = run(Triton, [t[one] for t in tensors], int32([count]), True, 0.0)
        assert all(torch.equal(a, t[one]) for a, t in zip(alone, together, strict=True))
    tensors, offsets = packed_inputs(lengths, 1)
    together = run(Packed, tensors, offsets, length, True, 0.0)
    for start, count in zip(offsets.tolist()[:-1], lengths, strict=True):
        rows = slice(start, start + count)
        alone = run(Packed, [t[rows] for t in tensors], int32([0, count]), length, True, 0.0)
        assert all(torch.equal(a, t[rows]) for a, t in zip(alone, together, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
@pytest.mark.parametrize(("length", "tile"), [(0, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64)])
def test_a_texts_tile_is_that_of_its_own_length(monkeypatch, length, tile):
    """Whatever it is padded to: that the bits are the same then, as the next test has it, the interpreter shows of
    different tiles too."""
    monkeypatch.undo()
    right, seen = short._row, set()

    def row(*args):
        seen.add((int(args[27]), int(args[28])))  # SIZE and G
        return right(*args)

    monkeypatch.setattr(short, "_row", row)
    q, k, v, _ = inputs(1, 64, 64, 1, 32, torch.bfloat16)
    for padded_to in (n for n in (16, 24, 35, 64) if n >= length):
        args = (*(t[:, :padded_to] for t in (q, k, v)), int32([length]))
        triton_impl.forward(*args, False, 0.2, 0.0, None)
        rows = [t[0, :length] for t in (q, k, v)]
        triton_impl.varlen_forward(*rows, int32([0, length]), padded_to, False, 0.2, 0.0, None)
    assert seen == {(tile, 1 if tile == 64 else 4)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 25, 40])
def test_a_text_does_not_depend_on_its_padding(monkeypatch, length, causal):
    """Bit by bit, in the tables' own tiles: alone, padded to whatever the longest of a batch has, and packed."""
    monkeypatch.undo()
    q, k, v, _ = inputs(2, 64, 64, 3, 32, torch.bfloat16)
    wanted = triton_impl.forward(q[:1, :length], k[:1, :length], v[:1, :length], None, causal, 0.2, 0.0, None)
    for padded_to in (n for n in (16, 24, 35, 64) if n >= length):
        args = (*(t[:, :padded_to] for t in (q, k, v)), int32([length, padded_to]))
        out, lse = triton_impl.forward(*args, causal, 0.2, 0.0, None)
        assert torch.equal(out[:1, :length], wanted[0]) and torch.equal(lse[:1, :, :length], wanted[1]), padded_to
        packed_up = [torch.cat([t[0, :length], t[1, :padded_to]]) for t in (q, k, v)]
        offsets = int32([0, length, length + padded_to])
        out, lse = triton_impl.varlen_forward(*packed_up, offsets, padded_to, causal, 0.2, 0.0, None)
        assert torch.equal(out[:length], wanted[0][0]) and torch.equal(lse[:length].T, wanted[1][0]), padded_to


@pytest.mark.parametrize(("form", "length"), EVERY_FORM)
def test_any_strides_and_addresses(monkeypatch, form, length):
    force(monkeypatch, form)
    q, k, v, dout = inputs(2, length, length, 1, 32, torch.float32)
    wanted = run(Triton, (q, k, v, dout), None, True, P)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    flat = torch.cat([v.flatten().new_zeros(1), v.flatten()])
    got = run(Triton, (*heads_first, flat[1:].view(v.shape), dout.contiguous()), None, True, P)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize(("form", "length"), [("long", 32), ("short16", 16), ("short32", 32), ("short64", 32)])
def test_dropout_has_the_bits_of_its_seed(monkeypatch, form, length):
    """With one-hot values out is the dropped probabilities themselves, with dout = out's like dv too."""
    force(monkeypatch, form)
    q, k, _, _ = inputs(2, length, length, 2, 32, torch.float32)
    one_hot = torch.eye(length, 32, device=DEVICE)[None, :, None].repeat(2, 1, 2, 1)
    seed = as_seed(SEED, P)
    out, lse, _, _, dv = run(Triton, (q, k, one_hot, one_hot), None, False, P)
    kept = keep_mask(seed, (2, 2, length, length), P, out.device)
    assert torch.equal(out.permute(0, 2, 1, 3)[..., :length] > 0, kept)
    assert torch.equal(dv.permute(0, 2, 3, 1)[:, :, :length] > 0, kept)
    longest = length + 3
    q, k, v = (t.flatten(0, 1) for t in (q, k, one_hot))
    out, _, _, _, dv = run(Packed, (q, k, v, v), int32([0, length, 2 * length]), longest, False, P)
    kept = keep_mask(seed, (2 * length, 2, longest), P, out.device)[..., :length]
    assert torch.equal(out[..., :length] > 0, kept)
    grads = dv.view(2, length, 2, 32)[..., :length].permute(0, 3, 2, 1).flatten(0, 1)
    assert torch.equal(grads > 0, kept)


@pytest.mark.parametrize(("form", "length"), [("long", 40), ("short16", 9), ("short64", 40)])
def test_nan_and_infinity(monkeypatch, form, length):
    force(monkeypatch, form)
    inf, nan = float("inf"), float("nan")
    q, k, v = (torch.ones(6, n, 2, 32, device=DEVICE) for n in (3, length, length))
    k[0, 3, 0, 5] = nan  # a key of head 0: NaN for all its queries, head 1 untouched
    k[1, 3, 0, 5] = -inf  # a key of weight 0
    k[2, 3, 0, 5] = inf  # NaN, as inf - inf is
    k[3, :, 0, 5] = -inf  # nothing but -inf: NaN, as torch.softmax gives
    q[4, -1, 0, 5] = nan  # that query alone
    k[5, : length - 1, 0, 5] = -inf  # whole tiles of -inf before a finite score
    out = triton_impl.forward(q, k, v, None, False, 32**-0.5, 0.0, None)[0]
    expected = torch.ones_like(out)
    expected[0, :, 0] = expected[2, :, 0] = expected[3, :, 0] = expected[4, -1, 0] = nan
    torch.testing.assert_close(out, expected, equal_nan=True)


@pytest.mark.parametrize(("form", "length"), EVERY_FORM)
def test_keys_past_a_length_are_not_read(monkeypatch, form, length):
    """Nor does a row that sees nothing take or give a gradient, whatever its scores would overflow to."""
    force(monkeypatch, form)
    tensors = inputs(3, length, length, 1, 32, torch.float32)
    lengths = int32([length - 3, 0, length])
    wanted = run(Triton, tensors, lengths, False, 0.0)
    for t in tensors[1:3]:
        t[0, length - 3 :], t[1] = float("nan"), float("nan")
    got = run(Triton, tensors, lengths, False, 0.0)
    assert all(map(torch.equal, got, wanted)) and all(t.isfinite().all() for t in (got[0], *got[2:]))
    large = [t * 100 for t in tensors]  # lse far below -128: exp2 of a masked score would be infinite
    large[1] = -large[0]
    assert all(t.isfinite().all() for t in run(Triton, large, lengths, False, 0.0)[2:])


BUGS = {
    "tail": lambda p: {"keys": p.keys - 1},
    "mask": lambda p: {"causal": not p.causal},
    "scale": lambda p: {"scale": 1.0},
    "length": lambda p: {"rows": p.rows - 1},
    "lengths": lambda p: {"rows": None},
    "seed": lambda p: {"seed": p.seed + 1},
    "dropout": lambda p: {"dropout_p": 0.35},
}


@pytest.mark.parametrize("module", [triton_impl, triton_backward_impl], ids=["forward", "backward"])
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize(("form", "length"), [("long", 21), ("short16", 13)])
def test_planted_bugs_are_seen(monkeypatch, form, length, bug, module):
    force(monkeypatch, form)
    monkeypatch.setattr(module, "padded", lambda *a: dataclasses.replace(p := padded(*a), **BUGS[bug](p)))
    with pytest.raises(AssertionError, match="error"):
        check((2, length, length, 1, 32), "all" if bug == "tail" else "every")


def test_edges():
    assert [edge_width(n, 64) for n in (197, 577, 901, 64, 95, 96, 127)] == [16, 16, 16, 16, 32, 32, 32]
    assert edge_width(None, 64) == 32 and edge_width(None, 16) == 16 and edge_width(40, 32) == 16


def test_what_is_refused():
    q = torch.empty(2, 5, 3, 2, 64)[:, :, 0]
    assert limits.triton_forward(q, q, q, None, False, 0.1) is None
    assert "32 or 64" in limits.triton_forward(q[..., :48], q[..., :48], q[..., :48], None, False, 0.1)
    assert "side by side" in limits.triton_forward(
        q, q.transpose(1, 3).contiguous().transpose(1, 3), q, None, False, 1.0
    )
    assert "one dtype" in limits.triton_forward(q, q.half(), q, None, False, 0.1)
    assert "above 0" in limits.triton_forward(q, q, q, None, False, 0.0)
    far = torch.empty_strided((1, 3, 2, 64), (0, 2**30, 64, 1), device="meta")
    assert "2^31" in limits.triton_forward(far, far, far, None, False, 0.1)
    assert "2^31" in limits.triton_varlen_forward(far[0], far[0], far[0], None, 3, False, 0.1)
    assert limits.triton_varlen_forward(far[0], far[0], far[0], None, 2, False, 0.1) is None
    row = next(i for i in op.FORWARD.impls if i.name == "triton")
    assert torch.float64 not in row.dtypes
