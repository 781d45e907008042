"""The kept corpus through each target, without atheris: no exception but the ones users may see, each within a second.

Knows targets by name; does not know what they read.
"""

import importlib
import time

import pytest

from tests.fuzz.harness import CORPUS, kept
from tests.fuzz.seeds import TARGETS

MOST = 200_000


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs_are_read_or_refused(name):
    target = importlib.import_module(f"tests.fuzz.{name}").one_input
    target(b"")
    count = 0
    for file, data in kept(name):
        start = time.monotonic()
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{name}/{file} got out as {type(error).__name__}") from error
        assert time.monotonic() - start < 1, file
        count += 1
    assert count >= 10


def test_the_corpus_is_small_and_our_own():
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) <= MOST
    for name, seeds in TARGETS.items():
        made = {file for file, _ in seeds()}
        assert made <= {file for file, _ in kept(name)}, "write it anew: python -m tests.fuzz.seeds"
