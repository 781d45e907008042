"""What a file says of itself, held against what was written into it and against what is decoded."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from miss.engine.data.errors import ImageError, ImageLimits, Reason
from miss.engine.data.facts import Facts, image_facts
from miss.engine.data.images import decode_image
from tests.engine.test_images import dicom_file

GREY = (np.arange(3 * 20 * 30) % 251).astype(np.int16).reshape(3, 20, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_stills() -> None:
    image = Image.new("RGB", (40, 30))
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        assert image_facts(encoded(image, kind)) == Facts(kind, 40, 30, 1, 0, False, None)
    assert image_facts(encoded(image, "TIFF")) == Facts("TIFF", 40, 30, None, 0, False, None)
    assert image_facts(encoded(image.convert("L").convert("I;16"), "PNG")).windowed


@pytest.mark.parametrize("turn", range(1, 9))
def test_size_is_that_of_the_decoded_image_however_it_is_turned(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif)
    facts = image_facts(data)
    assert (facts.height, facts.width) == decode_image(data).shape[:2]


def test_frames_of_animations() -> None:
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert image_facts(data).num_frames == 3


def test_dicom() -> None:
    data = dicom_file(GREY, WindowCenter=[40, 50], WindowWidth=[400, 350])
    assert image_facts(data) == Facts("DICOM", 30, 20, 3, 1, True, (40.0, 400.0))
    assert image_facts(dicom_file(GREY[0])) == Facts("DICOM", 30, 20, 1, 0, True, None)
    colour = image_facts(dicom_file(np.zeros((20, 30, 3), np.uint8)))
    assert not colour.windowed and colour.window is None
    blank = image_facts(dicom_file(GREY[0], WindowCenter="", WindowWidth=""))
    assert blank.windowed and blank.window is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_real_dicom_files_that_decode_have_facts() -> None:
    checked = 0
    for path in sorted((Path(pydicom.__file__).parent / "data").rglob("*.dcm")):
        data = path.read_bytes()
        try:
            shape = decode_image(data).shape
        except ImageError:
            continue
        facts = image_facts(data)
        assert facts.format == "DICOM" and (facts.height, facts.width) == shape[:2], path.name
        if facts.windowed and facts.window is not None:
            decode_image(data, frame=facts.frame, window=facts.window)
        checked += 1
    assert checked > 30


def test_what_is_broken_or_too_much_is_said() -> None:
    for data in (b"", b"not an image", b"\x89PNG\r\n\x1a\n1234"):
        with pytest.raises(ImageError) as refused:
            image_facts(data)
        assert refused.value.reason is Reason.CORRUPT
    with pytest.raises(ImageError) as refused:
        image_facts(dicom_file(GREY), ImageLimits(max_frames=2))
    assert refused.value.reason is Reason.TOO_MANY_FRAMES
