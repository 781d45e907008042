"""The page for who has no mouse, no eyes for it, little contrast or a phone, and the page of routes."""

import httpx
import numpy as np
import pytest

from tests.engine.serving import browser
from tests.engine.serving.test_process import XRAY
from tests.engine.serving.watching import FRACTURE, PHONE, SMALL_PHONE, heat

REASON = browser.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def choose_by_enter(page, tries=3):
    """Presses again where nothing came of it: on a machine with no core free the browser drops a dialog whose key press
    is too long ago for it (once in some ten runs beside the rest of the suite)."""
    from playwright.sync_api import TimeoutError as Late

    for left in reversed(range(tries)):
        try:
            with page.expect_file_chooser(timeout=8000) as chooser:
                page.keyboard.press("Enter")
        except Late:
            if not left:
                raise
        else:
            chooser.value.set_files(XRAY)
            return


def test_by_keyboard_alone(opened):
    watched = opened()
    page = watched.open()

    def tab_to(name, most=40):
        for _ in range(most):
            page.keyboard.press("Tab")
            found, ring = page.evaluate("probes.focused()")
            assert ring, f"no ring on {found}"
            if found == name:
                return
        raise AssertionError(f"{name} is not reached")

    page.keyboard.press("Tab")
    assert page.evaluate("probes.focused()")[0] == "Skip to the question"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    choose_by_enter(page)
    page.locator("#picture").wait_for()
    tab_to("question")
    page.keyboard.type("Which organ is shown")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#question").input_value().endswith("\n")
    page.keyboard.press("Backspace")
    page.keyboard.press("Enter")
    page.locator("#says").wait_for()
    assert page.evaluate("document.activeElement.id") == "question"  # asking takes nobody's place away
    tab_to(FRACTURE)
    page.keyboard.press("Space")
    assert page.locator("#question").input_value() == FRACTURE
    tab_to("ask")
    page.keyboard.press("Enter")
    page.locator("p.asked", has_text=FRACTURE).wait_for()
    assert page.evaluate("document.activeElement.id") == "ask"
    for _ in range(40):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("probes.focused()")[0] == "opacity":
            break
    page.keyboard.press("End")
    assert page.locator("#heat").evaluate("e => e.style.opacity") == "1"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    before = heat(page)
    page.keyboard.press("ArrowLeft")  # of the radio buttons round to the last: the answer's end
    assert (heat(page) != before).any()
    watched.end()


# Roles whose elements a screen reader must be able to call by a name.
CONTROLS = frozenset(
    "button link textbox slider spinbutton checkbox radio combobox meter DisclosureTriangle radiogroup region".split()
)


def nameless(watched):
    """Controls without a name, by Chromium's own tree of what a screen reader is told."""
    nodes = watched.context.new_cdp_session(watched.page).send("Accessibility.getFullAXTree")["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in nodes if not n["ignored"]]
    controls = [(role, name) for role, name in told if role in CONTROLS]
    assert len(controls) > 5
    return [role for role, name in controls if not name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_ids_and_contrast(opened, scheme):
    watched = opened(color_scheme=scheme, reduced_motion="reduce")
    page = watched.open()
    assert not nameless(watched) and not page.evaluate("probes.faint()")
    watched.pick()
    page.locator("summary").click()
    watched.ask("Which organ is shown? " * 12)  # with a warning
    assert page.locator(".warnings").is_visible()
    page.locator("#question").fill("")
    page.locator("#ask").click()
    assert page.locator("#problem").is_visible()
    assert not nameless(watched) and not page.evaluate("probes.faint()")
    assert not page.evaluate("probes.doubleIds()") and not page.evaluate("probes.pointersToNothing()")
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("h1").count() == 1 and page.title()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(11, 17, 20)"
    assert dark == (scheme == "dark")
    page.get_by_role("button", name="Dark").click()
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(11, 17, 20)") != dark
    watched.open("/docs", ready=False)
    page.locator(".route").first.wait_for()
    page.evaluate("probes.open()")
    assert not nameless(watched) and not page.evaluate("probes.faint()")
    watched.end()


@pytest.mark.parametrize("size", [PHONE, SMALL_PHONE])
def test_a_phone_scrolls_in_one_direction(opened, size):
    pytest.importorskip("pydicom")
    from tests.engine.test_images import dicom_file

    watched = opened(size, has_touch=True, is_mobile=True)
    page = watched.open()
    assert page.evaluate("probes.wider()") <= 0
    values = (np.arange(12 * 60 * 80) * 7 % 3000).astype(np.int16).reshape(12, 60, 80)
    watched.pick({"name": "a.dcm", "mimeType": "", "buffer": dicom_file(values)})
    page.locator("summary").tap()
    watched.ask("Which organ is shown? " + "x" * 300)
    assert page.evaluate("probes.wider()") <= 0
    places = [
        page.locator(name).bounding_box()["y"]
        for name in ("#image", "#question-card", "#answer", "#looked", "#history")
    ]
    assert places == sorted(places)
    assert not page.evaluate("probes.low()")
    watched.open("/docs", ready=False)
    page.locator(".route").first.wait_for()
    page.evaluate("probes.open()")
    assert page.evaluate("probes.wider()") <= 0
    watched.end()


def test_the_routes_page_shows_this_server_s_own_description(served_page, opened):
    watched = opened()
    page = watched.open("/docs", ready=False)
    page.locator(".route").first.wait_for()
    paths = httpx.get(served_page.url + "/openapi.json").json()["paths"]
    assert page.locator(".route h2").all_inner_texts() == list(paths)
    page.locator("section", has_text="/v1/image").locator("summary", has_text="multipart").click()
    assert "centre, width" in page.locator("section", has_text="/v1/image").inner_text()
    assert f"{served_page.url}/v1/vqa" in page.locator("pre", has_text="fracture").inner_text()
    watched.end()
