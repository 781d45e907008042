"""Other people's attention kernels as rows: what they refuse, where they stand. None of them is installed or imitated
here. FlexAttention's uncompiled form and SDPA's flash back end run on the CPU and are held against float64; what SDPA's
other back ends compute is not shown."""

import importlib.util

import pytest
import torch

from miss.kernels import registry
from miss.kernels.attention import attention, reference
from miss.kernels.evidence import Target
from miss.kernels.registry import OPS, use
from tests.helpers import assert_as_good_as

SDPA = ("sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math")
NAMES = ("flash_attn", "flash_attn_3", "flash_attn_4", "xformers", "flex", *SDPA)
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
        (T4, set(NAMES) - {"sdpa_math"}),
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
        ("attention", dense(causal=True), dict.fromkeys(set(NAMES) - {"sdpa_flash"})),
        ("attention", dense(causal=True), {"sdpa_flash": "as many queries as keys, got 5 and 7"}),
        ("attention", dense(causal=True, keys=5), dict.fromkeys(SDPA)),
        ("attention", dense(seed=SEED), dict.fromkeys(SDPA, "own generator")),
        (
            "attention",
            dense(lengths=torch.tensor([3, 7])),
            {"sdpa_flash": "no lengths", "sdpa_cudnn": None, "sdpa_efficient": None, "sdpa_math": None},
        ),
        (
            "attention",
            dense(width=20),
            {"sdpa_flash": None, "sdpa_cudnn": "multiple of 8", "sdpa_efficient": "multiple of 8", "sdpa_math": None},
        ),
        ("attention", dense(width=20, dtype=torch.float32), {"sdpa_efficient": None}),
        ("attention", dense(width=200), {"sdpa_flash": "up to 192", "sdpa_cudnn": "up to 128", "sdpa_efficient": None}),
        ("attention", dense(keys=1), {"sdpa_flash": None, "sdpa_cudnn": "two keys", "sdpa_efficient": None}),
        ("attention", dense(rows=0), dict.fromkeys(SDPA, "at least one row")),
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
        takes = name in ("flex", "sdpa_efficient", "sdpa_math")
        assert (reason is None) == takes and (takes or "does not take float32" in str(reason))
    mixed = list(dense())
    mixed[1] = mixed[1].half()
    assert all("one dtype for all" in str(reason) for reason in limits("attention", mixed).values())


def test_what_sdpas_back_ends_want_of_memory_and_settings():
    q, k, _, *rest = dense()
    late = torch.ones(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert "16 bytes" in str(limits("attention", (late, k, k, *rest))["sdpa_efficient"])
    apart = q.repeat_interleave(2, -1)[..., ::2]
    for name in SDPA:
        assert "side by side" in str(limits("attention", (apart, k, k, *rest))[name])
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in str(limits("attention", dense())["sdpa_cudnn"])
    finally:
        torch.use_deterministic_algorithms(False)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(5, 7, False), (65, 65, True), (1, 7, False), (197, 197, False)]
)
def test_sdpa_flash_on_a_cpu(dtype, queries, keys, causal):
    """Forced, values and gradients, of views of a packed projection, held against the `torch` row."""
    whole = torch.randn(2, max(queries, keys), 3, 2, 32).to(dtype).requires_grad_()
    dout = torch.randn(2, queries, 2, 32).to(dtype)
    q, k, v = whole[:, :queries, 0], whole[:, :keys, 1], whole[:, :keys, 2]
    seen: list[str] = []
    with use(attention="sdpa_flash"), registry.watch(lambda op, args, impl: seen.append(f"{op.name}:{impl.name}")):
        out = attention(q, k, v, causal=causal)
    assert seen == ["attention:sdpa_flash"]  # no backward table of ours: PyTorch's own gradient
    (got,) = torch.autograd.grad(out, whole, dout)
    with use(attention="torch"):
        plain = attention(q, k, v, causal=causal)
    (plain_grad,) = torch.autograd.grad(plain, whole, dout)
    exact = whole.detach().double().requires_grad_()
    with use(attention="reference"):
        want = attention(exact[:, :queries, 0], exact[:, :keys, 1], exact[:, :keys, 2], causal=causal)
    (want_grad,) = torch.autograd.grad(want, exact, dout.double())
    assert_as_good_as(out, plain, want, what="out")
    assert_as_good_as(got, plain_grad, want_grad, what="gradient")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [7, 0, 3]])
@pytest.mark.parametrize("queries", [5, 7])
def test_what_sdpas_back_ends_are_handed(queries, lengths, causal):
    """Masks, rows without keys, triangles that are no squares, by the one that runs on a CPU with all of them."""
    from miss.kernels.attention import sdpa_impl

    valid = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    q, k, v = torch.randn(3, queries, 2, 16), torch.randn(3, 7, 2, 16), torch.randn(3, 7, 2, 16)
    out, lse = sdpa_impl.math(q, k, v, valid, causal, 0.3, 0.0, None)
    want, _ = reference.forward(q.double(), k.double(), v.double(), valid, causal, 0.3, 0.0, None)
    assert lse is None
    assert_as_good_as(out, want.float(), want, what="out")


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_efficient", "sdpa_math"])
def test_gpu_back_ends_cannot_be_forced_on_a_cpu(name):
    with use(attention=name), pytest.raises(NotImplementedError, match="needs a cuda tensor, got cpu"):
        attention(*dense()[:3])
