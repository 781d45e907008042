"""The registry: who runs, who is forced, and what it says when that is impossible."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miss.kernels import registry
from miss.kernels.forcing import Forced, parse_choice
from miss.kernels.layer_norm import layer_norm
from miss.kernels.registry import ALL_FLOATS, OPS, Impl, Op, autocast_to, use

ROOT = Path(__file__).resolve().parents[2]


def norm_args(**kwargs):
    return torch.randn(2, 8, **kwargs), torch.ones(8, **kwargs), torch.zeros(8, **kwargs)


@pytest.fixture
def toy() -> Iterator[Op]:
    """An operation of three rows that say their name, and its backward table."""
    seen = []

    def row(name):
        return lambda x, *_: seen.append(name) or x * 1

    op = Op(
        "toy",
        Impl("fast", row("fast"), device="cuda"),
        Impl("narrow", row("narrow"), limits=lambda x, *_: None if x.shape[-1] < 9 else "rows over 8", composite=True),
        Impl("absent", row("absent"), requires="a_package_that_is_not_there"),
        Impl("reference", row("reference"), dtypes=ALL_FLOATS),
    )
    op.seen = seen
    backward = Op("toy_backward", Impl("narrow", row("narrow_backward")), Impl("reference", row("reference_backward")))
    backward.seen = seen
    yield op
    del OPS["toy"], OPS["toy_backward"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)


def test_first_that_fits_runs(toy):
    assert toy.select(torch.ones(2, 8)).name == "narrow"
    assert toy.select(torch.ones(2, 9)).name == "reference"
    assert toy.select(torch.ones(2, 8, dtype=torch.float64)).name == "reference"


def test_reference_of_every_operation_takes_float64():
    for op in OPS.values():
        assert op.impls[-1].name == "reference" and torch.float64 in op.impls[-1].dtypes, op.name
    x, w, b = norm_args(dtype=torch.float64)
    with use(layer_norm="reference"):
        y = layer_norm(x, w, b)
    truth = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert y.dtype == torch.float64 and (y - truth).abs().max() < 1e-14


@pytest.mark.parametrize("part", ["layer_norm", "layer_norm=", "=torch", "layer_norm:torch"])
def test_malformed_environment(part):
    with pytest.raises(ValueError, match="op=implementation"):
        parse_choice(part)


def test_environment_is_read_and_trimmed():
    assert parse_choice(" a=b , c=d,,") == {"a": "b", "c": "d"} and parse_choice("") == {}


def test_wrong_implementation_in_environment():
    forced = Forced(OPS, "layer_norm=refrence")
    with pytest.raises(ValueError, match=r"MISS_KERNELS: .*did you mean reference.*known: .*torch, reference"):
        forced.check_environment(OPS["layer_norm"])


def test_wrong_environment_stops_the_import():
    done = python("import miss.kernels.layer_norm", MISS_KERNELS="layer_norm=refrence")
    assert done.returncode == 1 and "MISS_KERNELS: layer_norm has no implementation named refrence" in done.stderr


def test_unknown_operation_in_environment_is_reported(monkeypatch):
    monkeypatch.setattr(registry, "_forced", Forced(OPS, "layer_norm=torch"))
    registry._forced.check_complete()
    monkeypatch.setattr(registry, "_forced", Forced(OPS, "layer_nrm=torch"))
    with pytest.raises(ValueError, match=r"MISS_KERNELS: no operation named layer_nrm \(did you mean layer_norm\?\)"):
        registry._forced.check_complete()


def test_environment_forces_forward_and_backward():
    code = """
from miss.kernels import layer_norm
from miss.kernels.registry import OPS
import torch
x = torch.ones(2, 4)
print(OPS["layer_norm"].select(x, x[0], x[0], 1e-5).name, OPS["layer_norm_backward"].select(x).name)
"""
    assert python(code, MISS_KERNELS="layer_norm=reference").stdout.split() == ["reference", "reference"]


@pytest.mark.parametrize("choice", [{"toyy": "narrow"}, {"toy": "narow"}])
def test_use_checks_names(toy, choice):
    with pytest.raises(ValueError, match="did you mean"), use(**choice):
        pass


def test_use_nests_and_ends(toy):
    x = torch.ones(2, 8)
    with use(toy="reference"):
        assert toy.select(x).name == "reference"
        with use(toy="narrow", layer_norm="reference"):
            assert toy.select(x).name == "narrow"
            with use(layer_norm="torch"):
                assert toy.select(x).name == "narrow"
        assert toy.select(x).name == "reference"
        with pytest.raises(RuntimeError), use(toy="narrow"):
            raise RuntimeError
        assert toy.select(x).name == "reference"
    assert toy.select(x).name == "narrow"


def test_use_reaches_the_backward_table(toy):
    x = torch.ones(2, 8)
    with use(toy="reference"):
        assert OPS["toy_backward"].select(x).name == "reference"
        with use(toy_backward="narrow"):
            assert OPS["toy_backward"].select(x).name == "narrow"
    with use(toy="fast"):  # no backward of that name: the backward's choice stays free
        assert OPS["toy_backward"].select(x).name == "narrow"


def test_use_is_seen_by_other_threads(toy):
    names = []
    with use(toy="reference"):
        thread = threading.Thread(target=lambda: names.append(toy.select(torch.ones(2, 8)).name))
        thread.start()
        thread.join()
    assert names == ["reference"]


def test_use_is_seen_by_backward_in_another_thread(monkeypatch):
    """As autograd's device threads do: backward starts on a thread that never entered the `with`."""
    table, ran = OPS["layer_norm_backward"], []
    select = Op.select
    monkeypatch.setattr(
        Op, "select", lambda self, *a: ran.append((self.name, select(self, *a).name)) or select(self, *a)
    )
    x, w, b = norm_args()
    x.requires_grad_()
    with use(layer_norm="reference"):
        y = layer_norm(x, w, b).square().sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert (table.name, "reference") in ran and x.grad is not None


def test_explain_names_every_row(toy):
    lines = toy.explain(torch.ones(2, 9)).splitlines()
    assert lines[0] == "toy((2, 9) float32 cpu):"
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
        "needs a cuda tensor, got cpu",
        "rows over 8",
        "needs the package a_package_that_is_not_there, which is not installed",
        "fits",
    ]
    with use(toy="narrow"):
        assert "reference  not asked for: narrow is forced" in toy.explain(torch.ones(2, 8))


def test_forcing_what_cannot_run_gives_every_reason(toy):
    with use(toy="fast"), pytest.raises(NotImplementedError) as error:
        toy(torch.ones(2, 9))
    said = str(error.value)
    for reason in ("needs a cuda tensor, got cpu", "rows over 8", "which is not installed", "fast is forced"):
        assert reason in said


def test_call_goes_through_the_custom_operator_only_where_it_must(toy):
    through = []

    def custom_op(x):
        return through.append(1) or x

    plain, wide = torch.ones(2, 8), torch.ones(2, 9)
    toy.call(custom_op, plain)
    toy.call(custom_op, plain.clone().requires_grad_())  # composite: autograd sees through it
    with torch.no_grad():
        toy.call(custom_op, wide.clone().requires_grad_())
    assert not through
    toy.call(custom_op, wide.clone().requires_grad_())
    assert through


def test_autocast_is_off_inside_an_implementation(toy):
    """A reference that turns to float32 for accuracy must not have its products turned back to bfloat16."""
    states = []
    object.__setattr__(toy.impls[1], "run", lambda x: states.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        toy(torch.ones(2, 8))
        toy.call(None, torch.ones(2, 8))
        assert torch.is_autocast_enabled("cpu")
    assert states == [False, False]


def test_autocast_to():
    x, none, ids, exact = torch.ones(2), None, torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64)
    assert autocast_to(x, none) == (x, none)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = autocast_to(x, none, ids, exact)
        assert got[0].dtype == torch.bfloat16 and got[1] is None and got[2] is ids and got[3] is exact
        assert autocast_to(x.bfloat16(), dtype=torch.float32)[0].dtype == torch.float32


def test_a_table_is_checked(toy):
    with pytest.raises(AssertionError, match="reference"):
        Op("bad", Impl("fast", lambda: None))
    with pytest.raises(AssertionError, match="twice"):
        Op("toy", Impl("reference", lambda: None))
    assert "bad" not in OPS


def test_forced_is_per_process_state_and_empty_by_default():
    forced = Forced(OPS, "")
    assert forced.get("layer_norm") is None
    assert registry._forced.get("layer_norm") is None


def test_import_miss_does_not_import_torch():
    done = python("import sys, miss; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr
