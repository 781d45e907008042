"""What the engine's process keeps of questions that nobody waits for any more."""

import gc
import socket
import time
import tracemalloc
from collections import deque
from functools import partial

from miss.engine.runtime.engine import Engine
from miss.engine.runtime.stepper import Stepper
from miss.engine.serving.engine_process import EngineServer, settle

SIDE = 392  # of whole patches
PIXELS = bytes(3 * SIDE * SIDE)


def ask(server, number, cancelled):
    """As frames come in: a question about an image of its own, and its cancellation at once or when it has begun."""
    item = {"id": number, "question": "which organ", "params": {}, "look": False}
    named = {"image": f"{number:064x}", "shape": [SIDE, SIDE, 3]}
    server.handle({"op": "ask", "items": [item], "timeout": 60.0, "stream": False, **named}, bytearray(PIXELS))
    if cancelled == "later":
        time.sleep(0.001)
    server.handle({"op": "cancel", "ids": [number]}, bytearray())


def left_behind(server, numbers, cancelled):
    """Bytes that cancelled questions leave, once they are fewer than one image or after some seconds."""
    before, _ = tracemalloc.get_traced_memory()
    for number in numbers:
        ask(server, number, cancelled)
    for _ in range(100):
        time.sleep(0.05)
        gc.collect()
        left = tracemalloc.get_traced_memory()[0] - before
        if left < len(PIXELS):
            break
    return left


def test_a_question_that_is_cancelled_at_once_or_later_leaves_nothing_behind(folder):
    """One that was cancelled before anything was done with it once kept its pixels for ever: 442 kB at 384 pixels."""
    ours, theirs = socket.socketpair()
    stepper = Stepper(partial(Engine.load, folder))
    try:
        server = EngineServer(stepper, theirs)
        ask(server, 0, "later")
        time.sleep(0.2)
        tracemalloc.start()
        try:
            later = left_behind(server, range(1, 31), "later")
            at_once = left_behind(server, range(31, 61), "at once")
        finally:
            tracemalloc.stop()
    finally:
        stepper.close()
        ours.close()
        theirs.close()
    assert later < len(PIXELS) and at_once < len(PIXELS), (later, at_once)


def test_the_collector_soon_looks_at_what_came_after_the_start():
    """Cycles that have grown old, as those of failed questions, are not kept for long."""
    gc.collect()
    settle()
    try:
        assert gc.get_freeze_count() > 10_000, "what was loaded"
        before, held = gc.get_stats()[2]["collections"], deque(maxlen=10_000)
        for number in range(160_000):
            one = []
            one.append(one)
            if not number % 5:
                held.append(one)
        assert gc.get_stats()[2]["collections"] > before
    finally:
        gc.unfreeze()
