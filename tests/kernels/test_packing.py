"""What packed bytes mean, how well they fit, and that files of them are checked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.kernels.quant_linear import PackingError, from_flat, pack_int4, pack_int8, packed_names, to_flat, unpack
from miss.kernels.quant_linear.packing import GROUPS, PackedWeight

ANY = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 9),
        "columns": st.integers(1, 300),
        "group": st.sampled_from(GROUPS),
        "symmetric": st.booleans(),
        "search": st.booleans(),
    }
)


def by_hand(packed: PackedWeight) -> torch.Tensor:
    """The meaning of the bytes, column by column, from the description in packing.py."""
    rows, columns = packed.shape
    w = torch.empty(rows, columns, dtype=torch.float64)
    for k in range(columns):
        if packed.scheme == "int8":
            w[:, k] = packed.data[:, k].double() * packed.scale.double()
            continue
        g, j = divmod(k, packed.group)
        half = packed.group // 2
        byte = packed.data[:, g * half + j % half]
        code = (byte & 15) if j < half else (byte >> 4)
        zero = 8 if packed.zero is None else packed.zero[:, g].double()
        w[:, k] = (code.double() - zero) * packed.scale[:, g].double()
    return w


@settings(max_examples=25, deadline=None)
@given(ANY)
def test_unpack_is_the_description_exactly(case):
    w = torch.randn(case["rows"], case["columns"])
    packed = pack_int4(w, case["group"], case["symmetric"], case["search"])
    assert torch.equal(unpack(packed).double(), by_hand(packed))
    assert torch.equal(unpack(packed, torch.float64), by_hand(packed))
    packed = pack_int8(w)
    assert torch.equal(unpack(packed, torch.float64), by_hand(packed))


@settings(max_examples=15, deadline=None)
@given(ANY)
def test_packing_again_changes_nothing(case):
    """What unpack gives can be stored exactly, so packing it again loses nothing more (int8: to float32's rounding)."""
    w = torch.randn(max(case["rows"], 1), case["columns"])
    once = unpack(pack_int8(w))
    torch.testing.assert_close(unpack(pack_int8(once)), once, rtol=1e-6, atol=0)


def test_int8_error_is_at_most_half_a_step():
    w = torch.randn(31, 97) * torch.logspace(-6, 3, 31)[:, None]
    packed = pack_int8(w)
    assert packed.data.dtype == torch.int8 and packed.scale.dtype == torch.float32
    assert ((unpack(packed) - w).abs() <= packed.scale[:, None] * 0.5001).all()
    assert (packed.data.abs().amax(1) == 127).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_search_is_never_worse_in_any_group_and_better_overall(symmetric, group):
    torch.manual_seed(0)
    w = torch.randn(40, 2 * group + 13)
    w[::5, ::17] *= 4

    def errors(search):
        squares = (unpack(pack_int4(w, group, symmetric, search)) - w).square()
        return torch.nn.functional.pad(squares, (0, group - 13)).unflatten(1, (3, group)).sum(-1)

    plain, searched = errors(False), errors(True)
    assert (searched <= plain * (1 + 1e-5)).all()
    assert searched.sum() < plain.sum() * (0.85 if symmetric else 0.97)


def test_importance_moves_the_error_to_where_it_costs_little():
    torch.manual_seed(0)
    w, importance = torch.randn(64, 128), torch.ones(128)
    importance[:16] = 100.0
    plain, weighted = ((unpack(pack_int4(w, 64, importance=i)) - w).square().mean(0) for i in (None, importance))
    assert weighted[:16].mean() < plain[:16].mean() * 0.95


def test_outliers_of_either_sign_get_the_longer_side():
    """The codes reach -8 … 7: a group whose largest weight is positive takes a negative scale, and loses nothing."""
    steps = torch.arange(-7, 9).float().repeat(2)[None]
    for w in (steps, -steps):
        assert torch.equal(unpack(pack_int4(w, 32)), w)


@pytest.mark.parametrize("pack", [pack_int8, pack_int4, lambda w: pack_int4(w, 32, symmetric=False)])
def test_zeros_tiny_and_constant_weights(pack):
    for w in (torch.zeros(3, 70), torch.full((3, 70), 1e-30), torch.full((3, 70), 1e-45), torch.full((3, 70), 0.5)):
        got = unpack(pack(w))
        assert got.isfinite().all() and ((got - w).abs() <= w.abs().max() * 0.01 + 1e-7).all()


def test_storage_is_what_is_promised():
    w = torch.randn(8, 256)
    assert pack_int8(w).nbytes == 8 * 256 + 8 * 4
    assert pack_int4(w, 64).nbytes == 8 * 128 + 8 * 4 * 2
    assert pack_int4(w, 64, symmetric=False).nbytes == 8 * 128 + 8 * 4 * 3


@settings(max_examples=15, deadline=None)
@given(ANY, st.booleans())
def test_flat_round_trip(case, dynamic):
    w = torch.randn(case["rows"], case["columns"])
    for packed in (pack_int8(w, dynamic), pack_int4(w, case["group"], case["symmetric"], False)):
        flat = to_flat(packed, "a.b") | {"other.weight": w}
        assert packed_names(flat) == ["a.b"]
        back = from_flat(flat, "a.b")
        assert back[3:] == packed[3:]
        for one, two in zip(back[:3], packed[:3], strict=True):
            assert one is two is None or torch.equal(one, two)


def test_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    packed = pack_int4(torch.randn(5, 70), 32, symmetric=False)
    save_file(to_flat(packed, "layer.weight"), tmp_path / "w.safetensors")
    assert torch.equal(unpack(from_flat(load_file(tmp_path / "w.safetensors"), "layer.weight")), unpack(packed))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.pop("w.scale"), "missing w.scale"),
        (lambda f: f.pop("w.layout"), "missing w.layout"),
        (lambda f: f.update({"w.data": f["w.data"][:, :-1]}), "w.data is torch.uint8"),
        (lambda f: f.update({"w.data": f["w.data"].to(torch.int8)}), "w.data is torch.int8"),
        (lambda f: f.update({"w.scale": f["w.scale"].float()}), "w.scale is torch.float32"),
        (lambda f: f.update({"w.zero": f["w.zero"][1:]}), "w.zero is torch.uint8"),
        (lambda f: f["w.layout"].__setitem__(0, 9), "version"),
        (lambda f: f["w.layout"].__setitem__(1, 5), "not a scheme"),
        (lambda f: f["w.layout"].__setitem__(2, 48), "not a scheme"),
        (lambda f: f["w.layout"].__setitem__(4, 1000), "wanted torch.uint8"),
        (lambda f: f["w.layout"].__setitem__(4, -1), "six whole numbers"),
        (lambda f: f["w.layout"].__setitem__(5, 1), "not a scheme"),
    ],
)
def test_altered_files_are_refused(change, says):
    flat = to_flat(pack_int4(torch.randn(5, 70), 32, symmetric=False), "w")
    change(flat)
    with pytest.raises(PackingError, match=says):
        from_flat(flat, "w")


def test_int8_with_zero_points_is_refused():
    flat = to_flat(pack_int8(torch.randn(5, 7)), "w")
    flat["w.zero"] = torch.zeros(5, 1, dtype=torch.uint8)
    with pytest.raises(PackingError, match="does not belong to int8"):
        from_flat(flat, "w")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack_int8(torch.zeros(3)), "float matrix"),
        (lambda: pack_int4(torch.zeros(3, 4, dtype=torch.int32)), "float matrix"),
        (lambda: pack_int8(torch.tensor([[1.0, float("nan")]])), "infinite or NaN"),
        (lambda: pack_int4(torch.tensor([[1.0, float("inf")]])), "infinite or NaN"),
        (lambda: pack_int4(torch.tensor([[1e9]])), "float16"),
        (lambda: pack_int4(torch.zeros(3, 4), group=48), "accepted: 32, 64, 128"),
        (lambda: pack_int4(torch.zeros(3, 4), importance=torch.ones(3)), "one number a column"),
    ],
)
def test_what_cannot_be_packed(call, says):
    with pytest.raises(ValueError, match=says):
        call()
