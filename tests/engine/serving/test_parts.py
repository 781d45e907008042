"""Decoders, bounds and the log, without a server."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from dataclasses import asdict

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.data import raster
from miss.engine.data.decoding import MISTAKE
from miss.engine.data.errors import ImageLimits, Reason
from miss.engine.data.images import decode_image
from miss.engine.data.processor import stretch
from miss.engine.serving import frames
from miss.engine.serving.admission import Admission
from miss.engine.serving.auth import Auth, is_loopback
from miss.engine.serving.image_worker import answer
from miss.engine.serving.images import BURNED_IN, ImagePool, Worker, WorkerEnded
from miss.engine.serving.logs import LOGGER, JsonLines
from miss.engine.serving.problems import OF_IMAGES, PROBLEMS, Refused
from miss.engine.serving.settings import Settings
from miss.models.config import PreprocessConfig
from tests.engine.serving.broken import burned_in, picture, png_that_declares
from tests.engine.serving.harness import png

PREPROCESS = PreprocessConfig(image_size=28, resample="bicubic")


def with_pool(use, **settings):
    async def main():
        pool = ImagePool(asdict(PREPROCESS), Settings(**{"decoders": 1, **settings}), lambda how: ended.append(how))
        await pool.start()
        try:
            return await use(pool)
        finally:
            await pool.close()

    ended = []
    return uvloop.run(main()), ended  # as the server does


def test_pixels_are_those_of_the_engine_s_own_decoding_and_are_kept():
    async def use(pool):
        return await asyncio.gather(*(pool.decode(data) for _ in range(3))), await pool.decode(data), pool.hits

    data = picture("CMYK", kind="JPEG")
    (together, again, hits), ended = with_pool(use)
    truth = stretch(decode_image(data), PREPROCESS).tobytes()
    assert together == [truth] * 3 and again == truth and hits == 1 and not ended


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("told", [False, True])
def test_a_process_that_has_ended_says_so_whether_or_not_that_was_noticed(run, told):
    async def main():
        worker = await Worker.start(asdict(PREPROCESS), Settings())
        worker.process.kill()
        end = time.monotonic() + 5
        while told and not worker.process.stdin.is_closing() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        with pytest.raises(WorkerEnded):
            await worker.ask(png(1), {"frame": None, "window": None, "facts": False})
        await worker.kill()

    run(main())


def test_memory_is_bounded_in_the_process_and_the_next_image_is_decoded():
    async def use(pool):
        with pytest.raises(Refused) as refused:
            await pool.decode(png_that_declares(9_000, 9_000, bytes(27_001 * 9_000)))
        return refused.value.code, await pool.decode(png(1))

    limits = ImageLimits(max_pixels=10**9)
    (code, pixels), _ = with_pool(use, decode_memory=400 << 20, image_limits=limits)
    assert code in ("image_too_large", "image_too_hungry") and len(pixels) == 28 * 28 * 3


def test_an_image_that_nobody_waits_for_any_more_is_not_decoded():
    async def use(pool):
        (process,) = pool.processes
        os.kill(process, signal.SIGSTOP)
        first = asyncio.create_task(pool.decode(png(1)))
        second = asyncio.create_task(pool.decode(png(2)))
        await asyncio.sleep(0.05)
        second.cancel()
        first.cancel()  # its process has it: it comes to its end, for the next who asks
        await asyncio.sleep(0.05)
        left = len(pool._running)
        os.kill(process, signal.SIGCONT)
        await pool.decode(png(1))
        return left, pool.queries - pool.hits, pool.processes == [process]

    (left, decoded, same), ended = with_pool(use)
    assert left == 1 and decoded == 3 and same and not ended


def test_a_decoder_that_dies_each_time_refuses_the_image():
    async def use(pool):
        async def kill():
            while True:
                for process in pool.processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                await asyncio.sleep(0)

        killer = asyncio.create_task(kill())
        try:
            with pytest.raises(Refused) as refused:
                await pool.decode(png(1))
        finally:
            killer.cancel()
        start = time.monotonic()
        await pool.decode(png(2))
        return refused.value.code, time.monotonic() - start

    (code, took), ended = with_pool(use)
    assert code == "image_corrupt" and ended.count("died") >= 3 and took < 5


def test_a_mistake_of_ours_is_no_image_s_fault_and_is_written_down(monkeypatch, caplog):
    asked = {"frame": None, "window": None, "facts": False}
    kind, told = answer(png(1), asked, None, ImageLimits())  # no preprocessing: ours
    assert kind == MISTAKE and json.loads(told)["exception"] == "AttributeError"
    assert "processor.py" in json.loads(told)["at"][-1]

    async def mistaken(self, *_):
        return MISTAKE, told

    async def use(pool):
        with pytest.raises(Refused) as refused:
            await pool.decode(png(1))
        return refused.value.code

    monkeypatch.setattr(Worker, "ask", mistaken)
    with caplog.at_level(logging.ERROR, LOGGER):
        code, ended = with_pool(use)
    assert code == "internal" and not ended
    (record,) = caplog.records
    assert record.msg == "image_worker_failed" and record.miss["exception"] == "AttributeError"


@pytest.mark.parametrize("name", ["to_rgb", "check_frame"])
def test_a_name_that_is_not_there_is_not_taken_for_a_damaged_image(monkeypatch, name):
    monkeypatch.delattr(raster, name)
    with pytest.raises(NameError):
        decode_image(png(1))
    kind, told = answer(png(1), {"frame": None, "window": None, "facts": False}, PREPROCESS, ImageLimits())
    assert (kind, json.loads(told)["exception"]) == (MISTAKE, "NameError")


def test_text_that_a_file_says_is_burned_in_is_warned_of():
    async def use(pool):
        return [await pool.noted(burned_in(told)) for told in (None, "NO", "YES", "yes ", "MAYBE")]

    found, _ = with_pool(use)
    assert [one.notes for one in found] == [[], [], [BURNED_IN], [BURNED_IN], []]
    assert len({one.pixels for one in found}) == 1 and len(found[0].pixels) == 3 * 28 * 28


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40), st.booleans()), max_size=30))
def test_bounds_hold_and_what_is_let_go_is_free(asked):
    admission, holding = Admission(10, 100, 1000), []
    for questions, pixels, leaves in asked:
        held = admission.hold(questions, pixels)
        try:
            held.__enter__()
            holding.append(held)
        except Refused as error:
            assert error.code == "queue_full"
        assert admission.questions.held <= 10 and admission.pixels.held <= 100
        if leaves and holding:
            holding.pop(0).__exit__(None, None, None)
    for held in holding:
        held.__exit__(None, None, None)
    assert admission.questions.held == admission.pixels.held == 0


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        *[(name, True) for name in ("127.0.0.1", "localhost", "[::1]", "::1")],
        *[(name, False) for name in ("0.0.0.0", "127.0.0.1.evil.org", "")],
    ],
)  # fmt: skip
def test_what_is_this_machine(host, ours):
    assert is_loopback(host) == ours


@given(st.binary(max_size=60))
def test_no_header_passes_for_the_key(header):
    auth = Auth("the-key-itself", loopback=True)
    if header.lower().partition(b" ")[0] == b"bearer" and header.partition(b" ")[2].strip() == b"the-key-itself":
        return
    with pytest.raises(Refused):
        auth.check("/v1/vqa", {b"authorization": header})


def test_a_line_of_the_log_holds_nothing_that_a_message_or_an_exception_says():
    formatter = JsonLines()
    try:
        raise ValueError("canary in an exception")
    except ValueError:
        import sys

        info = sys.exc_info()
    record = logging.LogRecord("uvicorn.error", logging.ERROR, "/a/b.py", 3, "canary %s", ("canary",), info)
    line = formatter.format(record)
    assert "canary" not in line and json.loads(line)["exception"] == "ValueError"
    own = logging.LogRecord(LOGGER, logging.INFO, "x.py", 1, "request", (), None)
    own.miss = {"seconds": 1.5}
    assert json.loads(formatter.format(own)) | {"time": 0} == {
        "time": 0, "level": "info", "event": "request", "seconds": 1.5,
    }  # fmt: skip


def test_each_reason_of_an_image_has_its_word():
    assert set(OF_IMAGES) == set(Reason) and set(OF_IMAGES.values()) <= set(PROBLEMS)
    assert all(PROBLEMS[word].status == 422 for word in OF_IMAGES.values())


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=40)), st.binary(max_size=40_000))
def test_frames_arrive_as_they_were_written(message, data):
    async def written():
        reader, writer = await asyncio.open_connection(sock=ours)
        frames.write(writer, message, data)
        frames.write(writer, {"op": "next"})
        await writer.drain()
        found.append(await asyncio.to_thread(frames.receive, theirs))
        found.append(await asyncio.to_thread(frames.receive, theirs))
        frames.send(theirs, message)
        found.append(await frames.read(reader))
        writer.close()

    found = []
    ours, theirs = socket.socketpair()
    with theirs:
        asyncio.run(written())
        assert found == [(message, data), ({"op": "next"}, b""), (message, b"")]
        with pytest.raises(EOFError):
            frames.receive(theirs)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_frame_to_one_that_has_ended_goes_nowhere(run):
    async def main():
        reader, writer = await asyncio.open_connection(sock=ours)
        theirs.close()
        for _ in range(3):
            frames.write(writer, {"op": "stats"}, b"a" * 100_000)
            await asyncio.sleep(0.01)
        with pytest.raises((EOFError, OSError)):
            await frames.read(reader)
        frames.write(writer, {"op": "stats"})
        writer.close()

    ours, theirs = socket.socketpair()
    run(main())


@pytest.mark.parametrize("sent", [b"\x02", frames.LENGTHS.pack(2, 9) + b"{}half", frames.LENGTHS.pack(1 << 31, 0)])
def test_a_frame_that_ends_early_or_is_none_ends_the_connection(sent):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(sent)
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            frames.receive(theirs)
