"""Launches are tried in turn and a winner is written: the order of events, by interpreted kernels whose times mean
nothing. What is not shown: that any launch wins on a GPU."""

import dataclasses
import importlib
import json

import pytest
import torch

from miss.benchmarks import going_on
from miss.benchmarks.gpu import tune
from miss.benchmarks.gpu.tune import Search
from miss.kernels import launches, registry, validation
from miss.kernels.ema import ema_
from miss.kernels.launches import Launch, Place
from miss.kernels.registry import OPS
from miss.kernels.validation import QUICK, gather
from tests.kernels.triton.device import DEVICE

PLACE = Place("ema", "any", "float32")


@pytest.fixture
def found():
    """A call of `ema` and its Triton row, whose table has one shape class and several launches."""
    averages, values = ([torch.randn(40, device=DEVICE) for _ in range(2)] for _ in range(2))
    (call,) = gather(lambda: ema_(averages, values, 0.9))
    return call, next(impl for impl in OPS["ema"].impls if impl.name == "triton")


def test_every_launch_is_measured_once_and_a_process_that_died_is_remembered(tmp_path, found):
    call, impl = found
    (place, table), *others = tune.asked(call, impl).items()
    assert (place, others) == (PLACE, []) and len(table) > 1
    search = Search(tmp_path / "tune.json", QUICK)
    search.save(trying=[*place, 1, f"ema {call.shape_class}"])
    search = Search(tmp_path / "tune.json", QUICK)
    assert search.run([found], float("inf"))
    content = json.loads((tmp_path / "tune.json").read_text())
    (ratios,) = content["measured"][str(PLACE)].values()
    assert set(ratios) == {str(i) for i in range(len(table))} - {"1"} and all(ratios.values()) and ratios["0"] == 1.0
    assert content["bad"] == [[*place, 1, f"ema {call.shape_class}"]] and "trying" not in content
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
    search._one(call, impl, PLACE, 1, second)
    assert search.content["measured"][str(PLACE)][f"ema {call.shape_class}"] == {"1": None}


def test_a_launch_and_the_default_take_their_samples_in_turn(tmp_path, found, monkeypatch):
    """A planted clock: each sample takes as long as its turn is late, as on a device that slows down all the time. Of
    two measures one behind the other the second would seem slower by far; the launches are the same."""
    call, impl = found
    module = importlib.import_module("miss.kernels.ema.triton_impl")
    default, turns = module.LAUNCHES["any"][0], []

    def sample(run, calls, device):
        run()
        turns.append(launches._trials[-1](PLACE, default))
        return 1.0 + 0.1 * len(turns)

    monkeypatch.setattr(validation, "_sample", sample)
    same = Launch(default.blocks, default.num_warps, default.num_stages + 1)
    search = Search(tmp_path / "tune.json", QUICK)
    search._one(call, impl, PLACE, 1, same)
    assert [turn is default for turn in turns[-6:]] == [True, False, False, True, True, False] or [
        turn is default for turn in turns[-6:]
    ] == [False, True, True, False, False, True]
    assert search.content["measured"][str(PLACE)][f"ema {call.shape_class}"]["1"] == pytest.approx(1.0, abs=0.1)


def test_a_device_that_is_lost_ends_the_process_and_the_next_goes_on_behind_it(tmp_path, found, monkeypatch):
    """A planted fault: an access beyond memory, which comes back as the row's failure."""
    call, impl = found
    failed = dataclasses.replace(validation.blank(call, impl), failure="CUDA error: an illegal memory access")
    monkeypatch.setattr(tune, "measure", lambda *_: failed)
    monkeypatch.setattr(tune, "sound", lambda device: False)
    search = Search(tmp_path / "tune.json", QUICK)
    with pytest.raises(SystemExit) as ended:
        search._one(call, impl, PLACE, 1, Launch({"BLOCK": 64}))
    assert ended.value.code == going_on.AGAIN
    monkeypatch.undo()
    again = Search(tmp_path / "tune.json", QUICK)
    again._one(call, impl, PLACE, 1, Launch({"BLOCK": 64}))
    assert again.content["bad"][0][:4] == [*PLACE, 1] and "illegal" in again.content["bad"][0][5]
    assert again.content["measured"][str(PLACE)][f"ema {call.shape_class}"] == {}


def test_the_winner_is_right_in_all_calls_and_beats_the_default(tmp_path):
    search = Search(tmp_path / "tune.json", QUICK)
    search.content["measured"]["op/long/bfloat16 64"] = {
        "a": {"0": 1.0, "1": 0.5, "2": 0.8},
        "b": {"0": 1.0, "1": None, "2": 0.9},
        "c": {"0": None, "2": 0.1},  # where its default is wrong it says nothing
    }
    launch = {"num_warps": 4, "num_stages": 2}
    search.content["tables"] = {
        "op/long/bfloat16 64": {
            "place": ["op", "long", "bfloat16 64"],
            "launches": [{"blocks": {"BM": n}, **launch} for n in (1, 2, 3)],
        }
    }
    assert search.winners() == {("op", "long", "bfloat16 64"): (2, pytest.approx(0.8485, abs=1e-3))}
    assert tune.report(search)["table"] == {"op": {"long": {"bfloat16 64": {"blocks": {"BM": 3}, **launch}}}}


def test_a_trial_asks_first_and_ends_with_its_block():
    first, other = Launch({"BM": 1}), Launch({"BM": 2})
    choose = lambda: launches.choose("op", "kind", {"kind": first}, torch.zeros(1), 64)  # noqa: E731
    asked = (("op", "kind", "float32 64"), first)
    with launches.trial(lambda place, default: other if (place, default) == asked else None):
        assert choose() is other
        with launches.trial(lambda place, default: default):
            assert choose() is first
    assert choose() is first


class OnGpu:
    """A tensor of a GPU, as far as choosing a launch looks at it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", 0)


def test_what_was_tuned_is_taken_in_its_own_dtype_and_sizes_alone(tmp_path, monkeypatch):
    first, other = Launch({"BM": 1}), Launch({"BM": 2})
    kinds = {"long": {"bfloat16 64 512": dataclasses.asdict(other)}, "short": {"bfloat16 64": {"blocks": {"BN": 1}}}}
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps({"attention": kinds}))
    monkeypatch.setattr(launches, "TUNED", tmp_path)
    monkeypatch.setattr(launches, "_device_name", lambda index: "NVIDIA H200")
    launches.tuned.cache_clear()

    def choose(kind: str, dtype: torch.dtype, *sizes: int) -> Launch:
        return launches.choose("attention", kind, {"long": first, "short": first}, OnGpu(dtype), *sizes)

    try:
        asked: launches.Asked = {}
        with launches.watched(asked):
            assert choose("long", torch.bfloat16, 64, 577) == choose("long", torch.bfloat16, 64, 1023) == other
            assert choose("long", torch.float16, 64, 577) is first
            assert choose("long", torch.bfloat16, 64, 197) is first
            assert choose("short", torch.bfloat16, 64) is first  # of a kernel with other blocks
        assert asked["attention/long/bfloat16 64 512"] == dataclasses.asdict(other)
        assert asked["attention/long/float16 64 512"] is None and len(asked) == 4
        assert launches.same(asked, launches.tuned("NVIDIA H200"))
        assert not launches.same(asked, {})
    finally:
        launches.tuned.cache_clear()


def test_every_table_of_launches_is_found():
    registry.load_all()
    import miss.kernels.ema.triton_impl as module

    assert any(table is module.LAUNCHES for table in tune.tables())
