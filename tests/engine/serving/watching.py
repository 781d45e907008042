"""A page in a real Chromium, and all that it does besides what is looked at: requests, faults, what it stores."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests.engine.serving.test_process import XRAY

DESKTOP, PHONE, SMALL_PHONE = (1240, 1000), (390, 844), (320, 640)
ORGAN, FRACTURE = "Which organ is shown?", "Is there a fracture?"
PROBES = Path(__file__).with_name("probes.js").read_text()


class Watched:
    """A page in a context of its own, and what it did. failures: statuses that its requests got on purpose."""

    def __init__(self, chrome, url, size=DESKTOP, **options):
        self.url, self.requests, self.console, self.errors = url, [], [], []
        self.context = chrome.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        self.context.set_default_timeout(20_000)
        self.context.add_init_script(PROBES)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda message: self.console.append((message.type, message.text)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, path="/", ready=True):
        self.page.goto(self.url + path)
        if ready:
            self.page.get_by_text("Ready", exact=True).wait_for()
        return self.page

    def pick(self, file=XRAY):
        self.page.locator("#file").set_input_files(file)
        self.page.locator("#stage[data-state=image][aria-busy=false]").wait_for()

    def ask(self, question):
        self.page.locator("#question").fill(question)
        self.page.locator("#ask").click()
        self.page.locator("p.asked", has_text=question).wait_for()

    def end(self, *failures):
        """Nothing but this server was asked; nothing failed that should not; nothing is kept."""
        stored = self.page.evaluate("probes.stored()")
        self.context.close()
        assert stored == [0] * 6
        foreign = [r.url for r in self.requests if not r.url.startswith((self.url + "/", "data:", "blob:" + self.url))]
        assert not foreign
        assert not self.errors, self.errors
        wrong = [text for kind, text in self.console if kind in ("error", "warning")]
        assert all(any(f"status of {code}" in text for code in failures) for text in wrong), wrong


def heat(page):
    """The drawn map, (256, 256, 4)."""
    drawn = page.evaluate("document.getElementById('heat').toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))))


def facts(page, said):
    page.locator("#facts", has_text=said).wait_for()


def text(page, selector):
    return page.locator(selector).inner_text()
