"""The system's Chromium under playwright, or why there is none; nothing is downloaded."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")


def executable() -> str | None:
    """MISS_CHROMIUM, or the first that is found."""
    return os.environ.get("MISS_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


def missing() -> str | None:
    """Why there is no browser here; None where there is one."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install 'miss-engine[browser]'"
    if executable() is None:
        return "no Chromium: apt-get install chromium, or name one in MISS_CHROMIUM"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's. The sandbox is off: tests run as root in containers, over pages of our own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable(), args=[*FLAGS])
        yield browser
        browser.close()
