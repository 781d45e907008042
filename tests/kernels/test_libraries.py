"""Other people's attention kernels as rows: what they refuse, where they stand. None of them is installed or imitated
here, but for FlexAttention, whose uncompiled form runs on the CPU and is held against float64."""

import importlib.util

import pytest
import torch

from miss.kernels import registry
from miss.kernels.attention import reference
from miss.kernels.evidence import Target
from miss.kernels.registry import OPS, use
from tests.helpers import assert_as_good_as

NAMES = ("flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "flex")
A100, H100, B200, RTX5090, T4 = (Target(None, c) for c in ((8, 0), (9, 0), (10, 0), (12, 0), (7, 5)))
SEED = torch.tensor(1)


def dense(dtype=torch.bfloat16, width=64, keys=7, lengths=None, causal=False, seed=None, rows=2):
    q, k = torch.ones(rows, 5, 3, width, dtype=dtype), torch.ones(rows, keys, 3, width, dtype=dtype)
    return q, k, k, lengths, causal, width**-0.5, 0.0 if seed is None else 0.1, seed


def packed(dtype=torch.bfloat16, width=64, offsets=torch.int32, seed=None, rows=9):
    q = torch.ones(rows, 3, width, dtype=dtype)
    ends = torch.tensor([0, 4, rows], dtype=offsets)
    return q, q, q, ends, 5, False, width**-0.5, 0.0 if seed is None else 0.1, seed


def refusals(op: str, args, target=H100) -> dict[str, str | None]:
    """Why each library's row cannot run there; a package that is missing here stands for nothing else amiss."""
    table = OPS[op]
    with registry.pretend(target):
        found = {}
        for impl in table.impls:
            if impl.name in NAMES:
                reason = table.why_not(impl, *args)
                fits = impl.limits is not None and impl.limits(*args) is None
                found[impl.name] = None if fits and reason and "not installed" in reason else reason
        return found


def limits(op: str, args) -> dict[str, str | None]:
    return {i.name: i.limits(*args) for i in OPS[op].impls if i.name in NAMES and i.limits is not None}


def test_where_they_stand():
    """Above `torch` for packed sequences alone: they run by themselves there, where they are installed."""
    names = OPS["attention"].names
    assert all(names.index("torch") < names.index(name) for name in NAMES)
    names = OPS["attention_varlen"].names
    assert [n for n in names if n in NAMES] == ["flash_attn_3", "flash_attn", "flash_attn_4", "xformers"]
    assert names.index("flash_attn") < names.index("torch") < names.index("flash_attn_4")
    for op in ("attention", "attention_varlen"):
        assert all(i.composite and not i.sources for i in OPS[op].impls if i.name in NAMES)


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        (T4, set(NAMES)),
        (A100, {"flash_attn_3", "flash_attn_4"}),
        (H100, set()),
        (B200, {"flash_attn_3"}),
        (RTX5090, {"flash_attn_3", "flash_attn_4"}),
    ],
    ids=["T4", "A100", "H100", "B200", "RTX5090"],  # a set's order is another in each worker
)
def test_which_gpus_they_serve(target, refused):
    found = refusals("attention", dense(), target)
    assert {name for name, reason in found.items() if "compute capability" in str(reason)} == refused


@pytest.mark.parametrize(
    ("op", "args", "says"),
    [
        (
            "attention",
            dense(seed=SEED),
            {"flash_attn": "own generator", "xformers": "own generator", "flex": "no dropout"},
        ),
        ("attention", dense(lengths=torch.tensor([3, 7])), {"flash_attn": "no lengths", "flex": None}),
        ("attention", dense(width=20), {"flash_attn": "multiple of 8", "flash_attn_4": "(64, 96, 128)", "flex": None}),
        ("attention", dense(width=264), {"flash_attn": "up to 256", "flash_attn_3": "up to 256", "flex": None}),
        ("attention", dense(width=8), {"flash_attn": None, "flex": "at least 16"}),
        (
            "attention",
            dense(width=32),
            {"flash_attn": None, "flash_attn_3": None, "flash_attn_4": "got 32", "flex": None},
        ),
        ("attention", dense(rows=0), {"flash_attn": "at least one row", "flex": "at least one row"}),
        ("attention", dense(causal=True), dict.fromkeys(NAMES)),
        ("attention_varlen", packed(), {"flash_attn": None, "flash_attn_3": None, "xformers": None}),
        ("attention_varlen", packed(seed=SEED), {"flash_attn": "own generator", "flash_attn_3": "own generator"}),
        ("attention_varlen", packed(offsets=torch.int64), {"flash_attn": "int32 offsets", "xformers": "int32 offsets"}),
        ("attention_varlen", packed(width=12), {"flash_attn": "multiple of 8"}),
    ],
)
def test_what_they_refuse(op, args, says):
    found = limits(op, args)
    for name, text in says.items():
        assert (found[name] is None) if text is None else (text in str(found[name])), (name, found[name])


def test_dtypes():
    for name, reason in refusals("attention", dense(dtype=torch.float32)).items():
        assert (reason is None) == (name == "flex") and (name == "flex" or "does not take float32" in reason)
    mixed = list(dense())
    mixed[1] = mixed[1].half()
    assert all("one dtype for all" in str(reason) for reason in limits("attention", mixed).values())


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_what_is_not_installed_is_said_and_cannot_be_forced():
    with registry.pretend(H100):
        reason = str(OPS["attention_varlen"].explain(*packed()))
        assert "needs the package flash_attn.flash_attn_interface, which is not installed" in reason
        with use(attention_varlen="flash_attn"), pytest.raises(NotImplementedError, match="not installed"):
            OPS["attention_varlen"](*packed())


def test_half_an_installation_is_told_from_none(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN3c104cuda")

    assert registry._absent("a_package_that_is_not_there.inside") is not None
    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert "cannot be imported: ImportError: undefined symbol" in str(registry._absent("flash_attn.cute"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (7, 7), (1, 7)])
def test_flex_is_ours_uncompiled(queries, keys, lengths, causal):
    """Values and logarithms of sums; rows of no keys, more keys than queries. Its gradient is not made on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    from miss.kernels.attention import flex_impl

    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(3, queries, 2, 16), torch.randn(3, keys, 2, 16), torch.randn(3, keys, 2, 16)
    out, lse = flex_impl.attend(flex_attention, q, k, v, valid, causal, 0.3)
    want, want_lse = reference.forward(q.double(), k.double(), v.double(), valid, causal, 0.3, 0.0, None)
    assert_as_good_as(out, want.float(), want, what="out")
    seen = want_lse.isfinite()
    assert_as_good_as(lse[seen], want_lse[seen].float(), want_lse[seen], what="lse")
    assert (out[~seen.transpose(1, 2)] == 0).all()
