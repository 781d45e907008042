"""The bench: wrong answers are never timed, inputs rotate and are not zeros, rows are complete, shares add up."""

import dataclasses
import json
import pkgutil

import pytest
import torch
from torch import Tensor

import miss.kernels
from miss.benchmarks import compare, harness, plots, record, report, suite
from miss.benchmarks.cases import Case, Peer, Settings
from miss.benchmarks.ceilings import Ceilings
from miss.benchmarks.harness import measure
from miss.benchmarks.inputs import int4_weight, int8_weight, normal
from miss.benchmarks.shapes import Shapes
from miss.kernels.layer_norm import layer_norm
from miss.kernels.quant_linear import quant_linear, unpack

CPU = torch.device("cpu")
COLUMNS = {
    "op", "implementation", "shape", "dtype", "cache", "median_ms", "spread", "gflops", "gbps", "share_of_ceiling",
    "error", "ratio_to_peer",
}  # fmt: skip


class FixedCeilings(Ceilings):
    """100 GFLOP/s and 10 GB/s, at no cost."""

    def rate(self, kind: str) -> float:
        return 1e11

    def bandwidth(self, kind: str, nbytes: int | None = None) -> float:
        return 1e10


def make(generator: torch.Generator) -> tuple[Tensor, ...]:
    return normal(generator, 5, 8), 1 + normal(generator, 8, size=0.1), normal(generator, 8)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def bound(function):
    return lambda *inputs: lambda: function(*inputs)


def case(**changes) -> Case:
    given = dict(
        op="layer_norm", shape="M=5 C=8", dtype="float32", make=make, call=layer_norm, flops=320.0, reads=160.0,
        writes=160.0, peers=(Peer("plain", bound(plain)),), caches=("warm",),
    )  # fmt: skip
    return Case(**{**given, **changes})


def run(one: Case, cache="warm", repeats=3):
    return measure(one, cache, Settings(CPU, repeats), FixedCeilings(CPU))


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(harness, "last_cache_bytes", lambda device: 1000)


def test_rows_have_all_columns_and_agree_with_themselves():
    result = run(case())
    assert {row.implementation for row in result.rows} >= {"torch", "plain"} and not result.refused
    assert "reference" not in {row.implementation for row in result.rows}
    for row in result.rows:
        values = harness.as_json(row)
        assert COLUMNS <= values.keys() and json.loads(json.dumps(values)) == values
        assert row.repeats == 3 and row.median_ms > 0 and row.spread >= 0 and row.error < 1e-5
        assert row.gflops == pytest.approx(row.flops / row.median_ms / 1e6, rel=1e-3)
        assert row.gbps == pytest.approx(row.bytes / row.median_ms / 1e6, rel=1e-3)
        nearer = max(row.gflops / row.ceiling_gflops, row.gbps / row.ceiling_gbps)
        assert row.share_of_ceiling == pytest.approx(nearer, rel=1e-2)
        assert row.ceiling in ("fp32", "copy")
    best = min((r for r in result.rows if not r.ours), key=lambda r: r.median_ms)
    assert best.ratio_to_peer == 1 and all(row.peer == best.implementation for row in result.rows)
    assert sum(row.chosen for row in result.rows) == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x, w, b: plain(x, w, b) + 1e-3, "wrong: error"),
        (lambda x, w, b: plain(x, w, b) * float("nan"), "wrong: error"),
        (lambda x, w, b: plain(x, w, b)[:-1], "shape (4, 8)"),
        (lambda x, w, b: None, "0 results"),
        (lambda x, w, b: plain(x, w, b[:3]), "RuntimeError"),
    ],
)
def test_a_wrong_answer_is_refused_before_it_is_timed(answer, says):
    calls = []

    def wrong(*inputs):
        calls.append(inputs)
        return answer(*inputs)

    result = run(case(peers=(Peer("wrong", bound(wrong)),)))
    assert [r["implementation"] for r in result.refused] == ["wrong"] and says in result.refused[0]["reason"]
    assert "wrong" not in {row.implementation for row in result.rows} and len(calls) <= 2
    assert "refused" in report.block(case(), "warm", result)


def test_an_answer_that_is_wrong_for_later_inputs_alone_is_refused(small_cache):
    """As one is that keeps what it once packed."""
    first: list[Tensor] = []

    def stale(x, w, b):
        first.append(w)
        return plain(x, first[0], b)

    assert run(case(peers=(Peer("stale", bound(stale)),))).refused[0]["implementation"] == "stale"


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_inputs_rotate_and_are_not_zeros(cache, small_cache):
    seen = []

    def watched(x, w, b):
        seen.append((x.data_ptr(), x.abs().sum().item()))
        return plain(x, w, b)

    result = run(case(peers=(Peer("watched", bound(watched)),)), cache, repeats=10)  # one call each where it is slow
    assert {row.cache for row in result.rows} == {cache}
    places = {place for place, _ in seen[2:]}  # the first two are the check's
    wanted = 2 if cache == "warm" else 1 + -(-2000 // (5 * 8 * 4 + 2 * 8 * 4))
    assert len(places) == wanted and all(size > 0 for _, size in seen)
    assert len({size for _, size in seen}) == wanted  # not the same numbers elsewhere


def test_what_is_bound_once_is_not_timed_and_decides_who_fits(small_cache):
    made = []

    def bind(x, w, b):
        made.append(x)
        return lambda: layer_norm(x, w, b)

    result = run(case(bind=bind, peers=()))
    assert result.rows and len(made) == 1 + len(result.rows) * (2 + 2)  # who fits; two checked, two timed


def test_a_peer_may_give_the_first_results_alone():
    def first_of_two(x, w, b):
        return plain(x, w, b)[:2]

    both = case(call=lambda x, w, b: layer_norm(x, w, b).split([2, 3]), peers=(
        Peer("first", bound(first_of_two), results=1), Peer("short", bound(first_of_two)),
    ))  # fmt: skip
    assert [r["implementation"] for r in run(both).refused] == ["short"]


def test_inputs_of_zeros_are_an_error():
    def zeros(generator):
        return torch.zeros(5, 8), torch.ones(8), torch.ones(8)

    with pytest.raises(AssertionError, match="an input of zeros"):
        run(case(make=zeros))


def test_what_cannot_run_is_skipped_with_its_reason():
    result = run(case(peers=(Peer("absent", bound(plain), "not installed here"),)))
    assert {"absent": "not installed here"}.items() <= {
        s["implementation"]: s["reason"] for s in result.skipped
    }.items()


@pytest.mark.parametrize("packed", [int8_weight, int4_weight])
def test_packed_weights_are_made_in_their_format(packed):
    generator = torch.Generator().manual_seed(0)
    weight = packed(generator, 7, 100, *([False] if packed is int8_weight else []))
    x = normal(generator, 3, 100)
    torch.testing.assert_close(quant_linear(x, weight), x @ unpack(weight).T)
    assert 0.01 < unpack(weight).std() < 0.2


def test_every_operation_has_a_benchmark():
    every = {m.name for m in pkgutil.iter_modules(miss.kernels.__path__) if m.ispkg}
    assert not every - set(suite.folders()), "write benchmarks/bench_<op>.py"


def test_every_operation_of_the_suite_is_measured():
    """One linear of 3 rows, and the small model's shapes listed: unknown names are errors with the known ones."""
    cases = suite.select((), (), ("1,3,70,36",), CPU)
    assert {"linear", "gelu_mlp", "quant_linear", "quant_linear_w8a8"} <= {c.op for c, _ in cases}
    for one, cache in cases:
        small = dataclasses.replace(one, caches=("warm",))
        result = run(small, "warm", repeats=1)
        assert result.rows and not [r for r in result.refused if r["ours"]], (one.label, cache)
    listed = suite.select((), (), ("small", "base"), CPU)
    assert len({(c.label, cache) for c, cache in listed}) == len(listed)
    with pytest.raises(ValueError, match="did you mean gelu_mlp"):
        suite.select(("gelu_mpl",), (), ("small",), CPU)
    with pytest.raises(ValueError, match="accepted: float32"):
        suite.select((), ("int9",), ("small",), CPU)
    with pytest.raises(ValueError, match="four numbers"):
        Shapes("1,2", CPU)


def test_ceilings_are_measured_with_one_and_all_threads():
    found = Ceilings(CPU).record(repeats=1)
    parts = {name: part for name, part in found.items() if name.startswith("threads_")}
    assert f"threads_{torch.get_num_threads()}" in parts and "threads_1" in parts
    for part in parts.values():
        assert set(part) == {f"{k}_gflops" for k in ("fp32", "bf16", "int8")} | {
            f"{k}_gbps" for k in ("read", "copy", "read_l2", "read_l3")
        }
        assert all(value["median"] > 0 for value in part.values())
    assert "threads_1" in report.ceilings(found)


def test_a_run_comes_back_from_its_file_and_is_drawn(tmp_path):
    ceilings = {"source": "fixed", "threads_1": {"fp32_gflops": {"median": 100.0, "spread": 0.0},
                                                 "read_gbps": {"median": 10.0, "spread": 0.0}}}  # fmt: skip
    written = record.summary({**record.environment(CPU), "before": record.moment()}, ceilings, run(case()))
    path = tmp_path / "out" / "kernels-cpu.jsonl"
    record.write(path, written)
    again = record.read(path)
    assert again["rows"] == written["rows"] and again["environment"] == written["environment"]
    assert record.read(path.parent) == again
    (tmp_path / "printed").write_text(f"some table\n{json.dumps(written)}\n")
    assert record.read(tmp_path / "printed") == written
    drawn = plots.plots(written)
    assert set(drawn) == {"roofline-cpu.png", "layer_norm-cpu.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    for name in ("processor", "isa", "threads", "torch", "commit"):
        assert name in written["environment"]
    with pytest.raises(ValueError, match="no rows"):
        (tmp_path / "empty").write_text("{}")
        record.read(tmp_path / "empty")


def row(**changes):
    given = dict(
        op="linear", implementation="cpu", shape="M=1", dtype="float32", cache="warm", median_ms=1.0, spread=0.02,
        repeats=20, ceiling="fp32", ceiling_gflops=100.0, ceiling_gbps=10.0, ours=True,
    )  # fmt: skip
    return {**given, **changes}


def runs(before, after, refused=()):
    return compare.compare({"rows": before, "refused": []}, {"rows": after, "refused": list(refused)})


@pytest.mark.parametrize(
    ("changes", "peer_ms", "verdict"),
    [
        ({"median_ms": 1.3}, 2.0, "regression"),
        ({"median_ms": 1.06}, 2.0, "slower"),
        ({"median_ms": 0.7}, 2.0, "faster"),
        ({"median_ms": 1.01}, 2.0, ""),  # within the noise
        ({"median_ms": 1.3, "spread": 1.0}, 2.0, ""),
        ({"median_ms": 1.3, "ceiling_gflops": 77.0}, 2.6, ""),  # the whole machine was that much slower
        ({"median_ms": 1.0, "ceiling_gflops": 130.0}, 1.54, "regression"),  # a faster machine hides nothing
        ({"median_ms": 1.0, "ceiling_gflops": 130.0}, 2.0, ""),  # the ceiling alone is not enough
        ({"median_ms": 1.3}, 2.6, ""),  # nor are the peers
    ],
)
def test_compare_wants_two_witnesses_beyond_the_noise(changes, peer_ms, verdict):
    peer = row(implementation="torch", ours=False, median_ms=2.0)
    found = runs([row(), peer], [row(**changes), {**peer, "median_ms": peer_ms}])
    assert found.changes[0].verdict(0.1) == verdict
    assert len(found.regressions(0.1)) == (verdict == "regression")


@pytest.mark.parametrize(("changes", "verdict"), [({"median_ms": 1.3}, "regression"), ({"ceiling_gflops": 130.0}, "")])
def test_compare_takes_the_time_itself_where_there_is_no_peer(changes, verdict):
    assert runs([row()], [row(**changes)]).changes[0].verdict(0.1) == verdict


def test_compare_knows_peers_and_rows_of_one_run_alone():
    slow_peer = row(implementation="torch", ours=False)
    found = runs([slow_peer, row(op="old"), row()], [{**slow_peer, "median_ms": 9.0}, row(op="new")],
                 [{**{k: row()[k] for k in compare.KEY[:4]}, "ours": True}])  # fmt: skip
    assert not found.regressions(0.1)
    assert [key[0] for key in found.gone] == ["old"] and [key[0] for key in found.new] == ["new"]
    assert [key[:2] for key in found.broken] == [("linear", "cpu")]
    text = compare.report(found, 0.1)
    assert all(word in text for word in ("a peer", "gone", "new", "wrong now"))
