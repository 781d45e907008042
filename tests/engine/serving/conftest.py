"""One server for most tests, and one with a key and small bounds."""

import contextlib
import importlib.util

import pytest

from tests.engine.answering import write_checkpoint

MISSING = [
    name
    for name in (
        "fastapi",
        "uvicorn",
        "uvloop",
        "httptools",
        "pybase64",
        "prometheus_client",
        "multipart",
        "httpx",
        "openai",
        "psutil",
    )
    if not importlib.util.find_spec(name)
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(scope="session")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("serving") / "tiny", vocabulary)


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    from tests.engine.serving.harness import Running

    audit = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    running = Running(folder, audit_log=audit)
    yield running
    running.close()


@pytest.fixture(scope="session")
def tight(folder):
    """With a key, one decoder, few questions, short deadlines and small bodies."""
    from miss.engine.data.errors import ImageLimits
    from tests.engine.serving.harness import Running

    running = Running(
        folder, api_key="secret-of-tests", max_waiting=4, max_questions=4, max_body=200_000, decoders=1,
        header_timeout=0.6, body_timeout=0.8, decode_timeout=2.0, keep_alive=1.0,
        image_limits=ImageLimits(max_bytes=150_000, max_pixels=1_000_000, max_side=4096, max_frames=4),
    )  # fmt: skip
    yield running
    running.close()


@pytest.fixture(scope="session")
def served_page(tmp_path_factory):
    """`miss serve` with the checkpoint that ships, for a browser."""
    from tests.engine.serving.test_process import SMALL, Process

    if not (SMALL / "model.safetensors").exists():
        pytest.skip(f"{SMALL} is not there")
    process = Process(tmp_path_factory.mktemp("page"), SMALL, "--threads", "1")
    yield process
    assert process.terminate() == 0


@pytest.fixture(scope="module")
def chrome():
    """One a module, not a session: while it is there, its event loop stands in the way of `asyncio.run`."""
    from tests.engine.serving.browser import chromium

    with chromium() as one:
        yield one


@pytest.fixture
def opened(chrome, served_page):
    """Makes watched pages; what a failed test leaves open is closed after it."""
    from tests.engine.serving.watching import Watched

    made = []

    def make(*args, **options):
        made.append(Watched(chrome, served_page.url, *args, **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(Exception):
            one.context.close()
