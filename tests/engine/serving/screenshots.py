"""Pictures of the page for the docs: `make screenshots`, or python -m tests.engine.serving.screenshots [FOLDER].

They are made of the checkpoint and the radiograph that ship, in the system's Chromium, and stored as WebP: in the few
colours of a small PNG the map would get edges that are not there.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from PIL import Image

from tests.engine.serving.browser import chromium, missing

ROOT = Path(__file__).resolve().parents[3]
XRAY = ROOT / "examples" / "chest-xray.jpg"
QUESTIONS = ("What modality is this image?", "Is there a fracture?", "Which organ is shown?")
DESKTOP, PHONE = {"width": 1240, "height": 1000}, {"width": 390, "height": 844}


def store(picture: bytes, path: Path) -> None:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.save(path, "WEBP", quality=90, method=6)
    print(f"{path}  {image.width} x {image.height}  {path.stat().st_size / 1000:.0f} kB")


def opened(browser: Any, url: str, **context: Any) -> Any:
    page = browser.new_context(reduced_motion="reduce", **context).new_page()
    page.goto(url)
    page.get_by_text("Ready", exact=True).wait_for()
    return page


def asked(page: Any, *questions: str) -> Any:
    page.locator("#file").set_input_files(XRAY)
    page.locator("#picture").wait_for()
    for question in questions:
        page.locator("#question").fill(question)
        page.locator("#question").press("Enter")
        page.locator(".asked", has_text=question).first.wait_for()
    page.locator("#question").blur()  # no caret in the picture
    return page


def take(browser: Any, url: str, folder: Path) -> None:
    page = asked(opened(browser, url, viewport=DESKTOP, color_scheme="light"), *QUESTIONS)
    store(page.screenshot(full_page=True), folder / "page-light.webp")
    box = page.locator(".column").first.bounding_box()
    store(page.screenshot(full_page=True, clip=box), folder / "page-heat.webp")
    page = asked(opened(browser, url, viewport=DESKTOP, color_scheme="dark"), *QUESTIONS)
    store(page.screenshot(full_page=True), folder / "page-dark.webp")
    page = asked(opened(browser, url, viewport=PHONE, color_scheme="light", has_touch=True), *QUESTIONS[2:])
    page.evaluate("scrollTo(0, 0)")  # asking has brought the answer into view
    store(page.screenshot(full_page=True), folder / "page-phone.webp")
    page = opened(browser, url, viewport=DESKTOP, color_scheme="light")
    page.goto(url + "/docs")
    page.locator(".route").first.wait_for()
    store(page.screenshot(), folder / "page-routes.webp")


@contextmanager
def serving(log: IO[bytes]) -> Iterator[str]:
    """The address of a server with the checkpoint that ships, once it answers."""
    command = [sys.executable, "-P", "-m", "miss", "serve", "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().decode().split() if word.startswith("http://"))
        while httpx.get(url + "/ready").status_code != 200:
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait(40)


def main() -> int:
    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "img"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as log, serving(log) as url, chromium() as browser:
        take(browser, url, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
