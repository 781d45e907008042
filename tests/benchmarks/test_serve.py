"""A server under load: the arithmetic by hypothesis, clients against a server that stalls, one whole quick run."""

import asyncio
import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miss.benchmarks import bench_serve, serve_report
from miss.benchmarks.bench_serve import ratios
from miss.benchmarks.serve_figures import Visit, arrivals, good, holds, peak, percentile, point
from miss.benchmarks.serve_servers import LITSERVE, PEERS, ServerError, ours, spawn, start
from miss.cli import run
from tests.engine.answering import write_checkpoint

seconds = st.floats(0, 100, allow_nan=False)
visits = st.lists(
    st.builds(
        lambda due, lag, took, problem: Visit(due, due + lag, due + lag + took, problem),
        *(seconds, seconds, seconds, st.sampled_from(["", "", "late", "503"])),
    ),
    max_size=30,
)


@given(st.integers(0, 2**32), st.floats(0.1, 50), st.floats(0.1, 20))
def test_arrivals_are_their_seeds_in_order_and_in_time(seed, rate, length):
    found = arrivals(seed, rate, length)
    assert found == arrivals(seed, rate, length) == sorted(found)
    assert all(0 <= when < length for when in found)
    longer = arrivals(seed, rate, 2 * length)
    assert longer[: len(found)] == found


def test_arrivals_are_poisson():
    found = arrivals(7, 50.0, 400.0)
    gaps = np.diff([0.0, *found])
    assert len(found) == pytest.approx(20_000, abs=5 * math.sqrt(20_000))
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 50, rel=0.05)  # of an exponential: its mean
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(("rate", "length"), [(0, 1), (1, 0), (-1, 1), (math.nan, 1)])
def test_no_arrivals_without_a_rate_or_a_time(rate, length):
    with pytest.raises(ValueError, match="above 0"):
        arrivals(0, rate, length)


@given(st.lists(seconds, min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_are_numpys(values, share):
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-9)
    assert min(values) <= percentile(values, share) <= max(values)


@given(visits, seconds, seconds)
def test_goodput_is_no_more_than_was_answered_and_grows_with_its_limit(found, a, b):
    low, high = sorted((a, b))
    assert good(found, low) <= good(found, high) <= sum(not v.problem for v in found)
    assert good(found, high) == good(found[::-1], high)


@given(visits, st.floats(0.1, 50), st.floats(0.1, 50))
def test_a_point_says_all_visits_and_no_goodput_beyond_what_was_offered(found, rate, limit):
    said = point(found, rate, 10.0, limit)
    assert said["visits"] == len(found) == said["answered"] + sum(said["problems"].values())
    assert said["goodput"] <= said["offered"] and said["throughput"] <= said["offered"]
    assert said["ms"]["total"]["p50"] <= said["ms"]["total"]["p90"] <= said["ms"]["total"]["p99"]


def test_what_is_late_is_counted_from_when_it_was_due():
    stalled = [Visit(due=i / 10, sent=1.0, done=1.1) for i in range(10)]  # the client sent all of them after a stall
    said = point(stalled, 10, 1.0, 0.55)
    assert said["ms"]["total"]["p99"] == pytest.approx(1091, abs=1) and said["goodput"] == 4
    assert not holds(said) and holds(point(stalled, 10, 1.0, 2.0))
    assert peak([said, {"goodput": 7}]) == {"goodput": 7} and peak([]) is None


def test_an_open_loop_does_not_wait_for_a_server_that_stalls():
    """A server that answers nothing for a second: what is due meanwhile is sent, and its wait is counted."""
    aiohttp = pytest.importorskip("aiohttp")
    from miss.benchmarks.serve_client import Client, open_loop

    async def measured():
        open_at = asyncio.get_running_loop().time() + 0.7
        taken = []

        async def serve(reader, writer):
            while (await reader.readline()).strip():
                pass
            taken.append(asyncio.get_running_loop().time())
            await asyncio.sleep(max(0, open_at - asyncio.get_running_loop().time()))
            body = b'{"answer": "ct"}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        target = {"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "path": "/"}
        async with server, aiohttp.ClientSession() as session:
            client, due = Client(session, target), [0.0, 0.1, 0.2, 0.3]
            found = await open_loop(client, [[b"{}"]] * 4, due, 5.0)
            given_up = await open_loop(client, [[b"{}"]], [0.0], 0.0)
        return found, given_up, taken, open_at

    found, given_up, taken, open_at = asyncio.run(measured())
    assert [v.answers for v in found] == [("ct",)] * 4 and sum(when < open_at for when in taken) == 4
    assert found[0].latency > 0.5 and found[0].latency - found[3].latency == pytest.approx(0.3, abs=0.15)
    assert given_up[0].problem == "late" and given_up[0].latency == 0.0


def test_peers_that_are_absent_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "litserve" else object())
    assert "litserve" in LITSERVE.missing() and "peers" in LITSERVE.missing()
    assert PEERS["hf-fastapi"].missing() is None and ours("fp32").missing() is None
    assert run(["bench", "serve", "--peers", "nobody", "--no-plots"]) == 1


def test_a_server_that_cannot_start_says_its_last_words(tmp_path):
    with pytest.raises(ServerError, match="has ended"):
        start(ours("fp32"), tmp_path / "nothing", tmp_path, 1)
    with spawn("silent", ["true"], tmp_path, 1) as ended, pytest.raises(ServerError, match="said nothing"):
        ended.process.wait()
        ended.ask({})


def test_ratios_are_round_by_round():
    found = {"miss-fp32": {"many-cold": {"rounds": [10, 30]}}, "litserve": {"many-cold": {"rounds": [5, 10]}}}
    said = ratios(found, [ours("fp32"), LITSERVE])
    assert said["miss-fp32/litserve many-cold"]["median"] == 2.5


def test_a_quick_run_serves_answers_and_reports(tmp_path, capsys):
    for name in ("fastapi", "uvicorn", "prometheus_client", "aiohttp"):
        pytest.importorskip(name)
    words = {word.strip("?") for question in bench_serve.QUESTIONS for word in question.split()}
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *sorted(words)]) + "\n")
    folder = write_checkpoint(tmp_path / "tiny", vocabulary)
    flags = ["--checkpoint", str(folder), "--precision", "fp32", "--peers", "none", "--quick", "--threads", "1"]
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--no-plots", "--json"]
    assert run(["bench", "serve", *flags, *where]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"]["equal"] == {"miss-fp32": 4} and not found["failed"]
    cells = found["open"]["miss-fp32"]
    assert set(cells) == {"many-cold", "many-warm", "unique-cold", "unique-warm"}
    first = cells["many-cold"]["points"][0]
    assert first["answered"] and set(first["ms"]) == {"queue", "image", "question", "decode", "total"}
    assert found["single"]["fp32"]["unique-cold"]["ratio_p50"] > 0
    text = (tmp_path / "out" / "serve.md").read_text()
    assert text == serve_report.table(found) and "| miss-fp32 | many-cold |" in text and "tiny behind HTTP" in text
    pytest.importorskip("matplotlib")
    assert all(p.startswith(b"\x89PNG") for p in serve_report.plots(found).values())
