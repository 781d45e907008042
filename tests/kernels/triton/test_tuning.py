"""Launches are tried in turn and a winner is written: the order of events, by interpreted kernels whose times mean
nothing. What is not shown: that any launch wins on a GPU."""

import importlib
import json

import pytest
import torch

from miss.benchmarks.gpu import tune
from miss.benchmarks.gpu.tune import Search
from miss.kernels import launches, registry
from miss.kernels.ema import ema_
from miss.kernels.launches import Launch
from miss.kernels.registry import OPS
from miss.kernels.validation import QUICK, gather
from tests.kernels.triton.device import DEVICE


@pytest.fixture
def found():
    """A call of `ema` and its Triton row, whose table has one shape class and several launches."""
    averages, values = ([torch.randn(40, device=DEVICE) for _ in range(2)] for _ in range(2))
    (call,) = gather(lambda: ema_(averages, values, 0.9))
    return call, next(impl for impl in OPS["ema"].impls if impl.name == "triton")


def test_every_launch_is_measured_once_and_a_process_that_died_is_remembered(tmp_path, found):
    call, impl = found
    ((op, kind), table), *others = tune.asked(call, impl).items()
    assert (op, kind, others) == ("ema", "any", []) and len(table) > 1
    search = Search(tmp_path / "tune.json", QUICK)
    search.save(trying=[op, kind, 1, f"ema {call.shape_class}"])
    search = Search(tmp_path / "tune.json", QUICK)
    assert search.run([found], float("inf"))
    content = json.loads((tmp_path / "tune.json").read_text())
    (times,) = content["measured"]["ema/any"].values()
    assert set(times) == {str(i) for i in range(len(table))} - {"1"} and all(times.values())
    assert content["bad"] == [[op, kind, 1, f"ema {call.shape_class}"]] and "trying" not in content
    assert not Search(tmp_path / "none.json", QUICK).run([found], 0.0)


def test_a_launch_that_is_wrong_has_no_time(tmp_path, found, monkeypatch):
    """A planted fault: with the second launch nothing is averaged."""
    call, impl = found
    module = importlib.import_module("miss.kernels.ema.triton_impl")
    default, second, *_ = module.LAUNCHES["any"]
    right = module._planned

    def planted(averages, values, block):
        return [] if block == second.blocks["BLOCK"] else right(averages, values, block)

    assert default.blocks != second.blocks
    monkeypatch.setattr(module, "_planned", planted)
    search = Search(tmp_path / "tune.json", QUICK)
    search._one(call, impl, "ema", "any", 1, second)
    assert search.content["measured"]["ema/any"][f"ema {call.shape_class}"] == {"1": None}


def test_the_winner_is_right_in_all_calls_and_beats_the_default(tmp_path):
    search = Search(tmp_path / "tune.json", QUICK)
    search.content["measured"]["op/long"] = {
        "a": {"0": 10.0, "1": 5.0, "2": 8.0},
        "b": {"0": 10.0, "1": None, "2": 9.0},
        "c": {"0": None, "2": 1.0},  # without its default's time it says nothing
    }
    search.content["tables"] = {"op/long": [{"blocks": {"BM": n}, "num_warps": 4, "num_stages": 2} for n in (1, 2, 3)]}
    assert search.winners() == {("op", "long"): (2, pytest.approx(0.8485, abs=1e-3))}
    assert tune.report(search)["table"] == {"op": {"long": {"blocks": {"BM": 3}, "num_warps": 4, "num_stages": 2}}}


def test_a_trial_asks_first_and_ends_with_its_block():
    first, other = Launch({"BM": 1}), Launch({"BM": 2})
    choose = lambda: launches.choose("op", "kind", {"kind": first}, torch.device("cpu"))  # noqa: E731
    with launches.trial(lambda op, kind, default: other if (op, kind, default) == ("op", "kind", first) else None):
        assert choose() is other
    assert choose() is first


def test_every_table_of_launches_is_found():
    registry.load_all()
    import miss.kernels.ema.triton_impl as module

    assert any(table is module.LAUNCHES for table in tune.tables())
