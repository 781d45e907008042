"""The page as somebody uses it: a real Chromium clicks through it, against `miss serve` with the checkpoint that ships.

Every test watches what the page does besides: no request leaves the server, no fault in the console, nothing stored.
"""

import base64
import contextlib
import io
import os
import re
import signal

import httpx
import numpy as np
import pytest
from PIL import Image

from miss.engine.data.images import decode_image
from miss.engine.data.processor import stretch
from miss.models.config import PreprocessConfig
from tests.engine.serving import browser
from tests.engine.serving.harness import png, wait
from tests.engine.serving.test_process import XRAY
from tests.engine.serving.watching import FRACTURE, ORGAN, Watched, facts, heat, text

REASON = browser.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HAND = "(given) => probes.hand(...given)"
MODEL = PreprocessConfig(image_size=224, resample="bicubic")


def test_pick_ask_and_where_it_looked(opened):
    watched = opened()
    page = watched.open()
    assert "Research use only" in text(page, ".notice") and text(page, "#model") == "miss-small"
    watched.pick()
    seen = page.locator("#pixels").get_attribute("src").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(seen))))
    assert (pixels == stretch(decode_image(XRAY), MODEL)).all()
    page.get_by_role("button", name=ORGAN).click()
    with page.expect_response("**/v1/vqa") as answered:
        page.locator("#ask").click()
    page.locator("#says").wait_for()
    told = answered.value.json()
    answer = told["answers"][0]
    assert text(page, "#says") == answer["answer"] == "lung"
    assert page.locator("#others .score").count() == len(answer["alternatives"]) == 4
    meter = page.get_by_role("meter", name="Confidence")
    assert float(meter.get_attribute("aria-valuenow")) == pytest.approx(answer["score"], abs=1e-3)
    assert text(page, "#request-id") == told["id"] == answered.value.headers["x-request-id"]
    assert "Took" in text(page, ".took") and "on the server" in text(page, ".took")
    assert "lung" in text(page, "#said") and "Confidence" in text(page, "#said")

    whole = heat(page)
    assert whole[..., 3].min() == 0 and whole[..., 3].max() > 200
    assert page.locator("#heat").evaluate("e => e.style.opacity") == "0.7"
    page.locator("#opacity").fill("20")
    assert page.locator("#heat").evaluate("e => e.style.opacity") == "0.2"
    page.get_by_role("radio", name="its end").check(force=True)
    assert (heat(page) != whole).any()
    page.get_by_role("radio", name="Whole answer").check(force=True)
    assert (heat(page) == whole).all()
    page.locator("#patches").check()
    blocks = heat(page).reshape(16, 16, 16, 16, 4)
    assert (blocks == blocks[:, :1, :, :1]).all()  # 16 x 16 patches, each of one colour
    strongest = np.unravel_index(np.argmax(np.mean(answer["attention"]["maps"][:-1], axis=0)), (16, 16))
    red = blocks[:, 0, :, 0, 0]
    assert red[strongest] == red.max() and "of the picture" in text(page, "#heat-said")
    watched.end()


def test_the_file_itself_can_be_looked_at_with_the_map_right_over_it(opened):
    watched = opened()
    page = watched.open()
    watched.pick()
    watched.ask(ORGAN)
    page.get_by_role("radio", name="The file").check(force=True)
    box, over = page.locator("#pixels").bounding_box(), page.locator("#heat").bounding_box()
    assert box == over and box["width"] / box["height"] == pytest.approx(512 / 409, rel=0.01)
    assert page.locator("#pixels").evaluate("e => e.decode().then(() => e.naturalWidth)") == 512
    watched.end()


def test_drop_and_paste(opened):
    watched = opened()
    page = watched.open()
    data = [base64.b64encode(png(seed, (50, 40))).decode() for seed in (1, 2)]
    page.evaluate(HAND, ["dragenter", data[0]])
    assert page.locator("#veil").is_visible()
    assert page.evaluate(HAND, ["drop", data[0]]) is False  # or the browser would open the file itself
    assert not page.locator("#veil").is_visible()
    facts(page, "PNG · 50 × 40 → 224 × 224")
    first = page.locator("#pixels").get_attribute("src")
    assert page.evaluate(HAND, ["paste", data[1]]) is False
    page.wait_for_function("first => document.getElementById('pixels').src !== first", arg=first)
    page.locator("#question").focus()
    page.keyboard.insert_text("ct")
    assert page.locator("#question").input_value() == "ct"
    watched.end()


def test_cancel_ends_the_work_on_the_server(served_page, opened):
    watched = opened()
    page = watched.open()
    watched.pick()

    def metrics():
        lines = [line for line in httpx.get(served_page.url + "/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    for cancel in (lambda: page.locator("#cancel").click(), lambda: page.keyboard.press("Escape")):
        before = metrics().get('miss:requests_cancelled_total{stage="engine"}', 0)
        os.kill(served_page.engine.pid, signal.SIGSTOP)  # an answer that takes long
        try:
            page.locator("#question").fill(ORGAN)
            page.locator("#ask").click()
            page.locator("#cancel").wait_for()
            assert page.locator("#ask").is_disabled() and page.evaluate("document.activeElement.id") == "cancel"
            page.get_by_text(re.compile(r"Asking, [1-9]")).wait_for()
            cancel()
            page.locator("#cancel").wait_for(state="hidden")
        finally:
            os.kill(served_page.engine.pid, signal.SIGCONT)
        assert page.locator("#ask").is_enabled() and text(page, "#said") == "Cancelled"
        assert page.evaluate("document.activeElement.id") == "ask" and not page.locator("#answer").is_visible()

        def freed(before=before):
            found = metrics()
            gauges = [v for k, v in found.items() if k.startswith(("miss:num_requests", "miss:answer_slots"))]
            cancelled = found['miss:requests_cancelled_total{stage="engine"}'] - before
            return cancelled == 1 and found["miss:requests_in_flight"] == 0 and not any(gauges)

        wait(freed, 15, "its slots' being free")
    assert page.locator("#history").is_hidden()
    watched.ask(ORGAN)
    watched.end()


def test_a_damaged_file_is_said_and_the_next_one_works(opened):
    watched = opened()
    page = watched.open()
    page.locator("#ask").click()
    assert "no image yet" in text(page, "#problem") and page.evaluate("document.activeElement.id") == "file"
    page.locator("#file").set_input_files({"name": "Jane Doe.png", "mimeType": "image/png", "buffer": png(1)[:300]})
    alert = page.get_by_role("alert").filter(has_text="send the whole file")
    alert.wait_for()
    assert "image_truncated" in alert.inner_text() and page.locator("#stage").get_attribute("data-state") == "empty"
    assert page.evaluate("probes.sent") == [["v1/image", [["image", "image"]]]]  # not the file's own name
    page.locator("#question").fill(ORGAN)
    page.locator("#ask").click()
    assert "could not be read" in text(page, "#problem")
    page.locator("#file").set_input_files({"name": "a.gif", "mimeType": "image/gif", "buffer": b"GIF89a" + bytes(40)})
    page.get_by_text("image_unsupported_format").wait_for()
    watched.pick()
    assert not page.locator("#image-problem").is_visible()
    page.locator("#question").fill("   ")
    page.locator("#ask").click()
    assert "no question yet" in text(page, "#problem")
    watched.ask(ORGAN)
    watched.end(422)


def test_dicom_frame_and_window(opened):
    pytest.importorskip("pydicom")
    from tests.engine.test_images import dicom_file

    values = (np.arange(3 * 60 * 80) * 7 % 3000 - 1000).astype(np.int16).reshape(3, 60, 80)
    file = dicom_file(values, WindowCenter=500, WindowWidth=400)
    watched = opened()
    page = watched.open()
    watched.pick({"name": "scan.dcm", "mimeType": "application/dicom", "buffer": file})
    assert text(page, "#facts").startswith("DICOM · 80 × 60 · frame 2 of 3 · window 500, 400")
    assert page.locator("#sides").is_hidden()  # no browser shows DICOM

    def shown(**view):
        truth = stretch(decode_image(file, **view), MODEL)
        drawn = base64.b64decode(page.locator("#pixels").get_attribute("src").partition(",")[2])
        return (np.asarray(Image.open(io.BytesIO(drawn))) == truth).all()

    assert shown()
    page.get_by_role("slider", name="Frame").fill("3")
    facts(page, "frame 3 of 3")
    assert shown(frame=2) and page.locator("#frame").input_value() == "3"
    page.get_by_role("combobox", name="Window").select_option("-600,1500")
    facts(page, "window -600, 1500")
    assert shown(frame=2, window=(-600, 1500))
    page.get_by_label("Width").fill("900")
    facts(page, "window -600, 900")
    assert shown(frame=2, window=(-600, 900)) and page.locator("#preset").input_value() == "custom"
    page.locator("#question").fill(ORGAN)
    page.locator("#ask").click()
    page.locator("#says").wait_for()
    path, fields = page.evaluate("probes.sent.at(-1)")
    assert path == "v1/vqa" and [v for k, v in fields if k == "window"] == ["-600", "900"] and ["frame", "2"] in fields
    page.get_by_label("Width").fill("-5")
    page.get_by_text("image_bad_option").wait_for()
    assert not page.locator("#answer").is_visible()
    page.locator("#preset").select_option("")
    facts(page, "frame 3 of 3 · window 500, 400")
    assert shown(frame=2)
    watched.end(422)


def test_history_is_in_memory_only(opened):
    watched = opened()
    page = watched.open()
    watched.pick()
    watched.ask(ORGAN)
    first = heat(page)
    watched.ask(FRACTURE)
    assert page.locator("#entries button").count() == 2 and (heat(page) != first).any()
    num = len(watched.requests)
    page.locator("#entries button", has_text=ORGAN).click()
    page.locator("p.asked", has_text=ORGAN).wait_for()
    assert (heat(page) == first).all() and page.locator("#question").input_value() == ORGAN
    assert page.locator("#entries [aria-current=true]").inner_text().startswith("lung")
    assert not [r for r in watched.requests[num:] if not r.url.startswith("data:")]  # nothing was asked anew
    page.get_by_role("button", name="Forget all").click()
    assert page.locator("#history").is_hidden()
    watched.ask(ORGAN)
    page.reload()
    page.get_by_text("Ready", exact=True).wait_for()
    assert page.locator("#history").is_hidden() and page.locator("#question").input_value() == ""
    watched.end()


def test_answers_out_of_a_list_without_a_map(opened):
    watched = opened()
    page = watched.open()
    watched.pick()
    page.locator("summary").click()
    page.get_by_label("Only these answers").fill("liver\n lung \n\nheart")
    page.get_by_label("Where it looked").uncheck()
    watched.ask(ORGAN)
    assert text(page, "#says") in ("liver", "lung", "heart") and page.locator("#others .score").count() == 2
    assert page.locator("#looked").is_hidden() and page.locator("#heat").is_hidden()
    watched.end()


@pytest.fixture
def guarded(chrome, tight):
    """The page of a server with a key and small bounds."""
    watched = Watched(chrome, tight.url)
    yield watched
    with contextlib.suppress(Exception):
        watched.context.close()


def test_a_key_is_typed_in_and_kept_in_memory_only(guarded, tight):
    page = guarded.open(ready=False)
    page.get_by_text("This server wants a key").wait_for()
    page.wait_for_function("document.activeElement.id === 'key'")
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(1)})
    page.locator("#image-problem", has_text="unauthorized").wait_for()
    page.get_by_label("Key of the server").fill("wrong-key")
    with page.expect_response("**/v1/models") as refused:
        page.get_by_role("button", name="Use key").click()
    assert refused.value.status == 401
    page.get_by_label("Key of the server").fill("secret-of-tests")
    page.keyboard.press("Enter")
    page.get_by_text("Ready", exact=True).wait_for()
    assert page.locator("#key-panel").is_hidden() and page.locator("#key").input_value() == ""
    page.wait_for_function("document.activeElement.id === 'question'")
    page.get_by_role("button", name="Try again").click()
    page.locator("#picture").wait_for()
    guarded.ask("which organ")
    assert "secret" not in page.content() and not any("secret" in r.url for r in guarded.requests)
    page.reload()
    page.get_by_text("This server wants a key").wait_for()
    guarded.end(401)


def test_a_full_server_a_large_file_and_one_that_is_gone(guarded, tight):
    page = guarded.open(ready=False)
    page.get_by_label("Key of the server").fill("secret-of-tests")
    page.keyboard.press("Enter")
    page.get_by_text("Ready", exact=True).wait_for()
    guarded.pick({"name": "a.png", "mimeType": "image/png", "buffer": png(1)})
    bound = tight.service.admission.questions
    bound.take(4)
    page.locator("#question").fill("which organ")
    page.locator("#ask").click()
    page.get_by_text("Too many requests are waiting").wait_for()
    assert "queue_full · request" in text(page, "#problem")
    bound.free(4)
    page.get_by_role("button", name="Try again").click()
    page.locator("#says").wait_for()
    assert not page.locator("#problem").is_visible()
    num = len(guarded.requests)
    page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": bytes(300_000)})
    page.get_by_text("more bytes than this server takes").wait_for()
    assert not [r for r in guarded.requests[num:] if r.url.endswith("/v1/image")]  # it would not have been taken
    tight.service.admission.draining = True
    try:
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": png(2)})
        page.get_by_text("The server is stopping").wait_for()
        page.get_by_text("Stopping", exact=True).wait_for()
    finally:
        tight.service.admission.draining = False
    page.get_by_text("Ready", exact=True).wait_for()
    page.get_by_role("button", name="Try again").click()
    page.locator("#picture").wait_for()
    page.route("**/v1/vqa", lambda route: route.abort())
    page.locator("#ask").click()
    page.get_by_text("cannot be reached").wait_for()
    page.unroute("**/v1/vqa")
    assert page.evaluate("probes.stored()") == [0] * 6 and not guarded.errors
