"""What an image file says of itself, so that a viewer can offer its frames and its window.

Knows headers of the accepted formats; does not decode a pixel and reads no field that names anybody.
"""

import io
from dataclasses import dataclass

from PIL import Image

from miss.engine.data.errors import ImageError, ImageLimits, Reason
from miss.engine.data.images import DEFAULT_LIMITS, sniff

TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Facts:
    """format: as `sniff` names it. width, height: of a frame, upright, in pixels. num_frames: None where counting them
    would mean reading the whole file (TIFF). frame: the one that is taken where none is asked for.

    windowed: whether a window may be given. window: (centre, width) of the file's own, None where it has none that is
    applied: then the percentiles, or a table, decide.
    """

    format: str
    width: int
    height: int
    num_frames: int | None
    frame: int
    windowed: bool
    window: tuple[float, float] | None


def image_facts(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Facts:
    """The facts of a file that `decode_image` takes.

    Raises:
        ImageError: it does not begin as one.
    """
    kind = sniff(data)
    if kind == "DICOM":
        from miss.engine.data.dicom import dicom_header

        return Facts("DICOM", *dicom_header(data, limits))
    try:
        with Image.open(io.BytesIO(data), formats=(kind or "",)) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION) in TURNED:
                width, height = height, width
            frames = None if kind == "TIFF" else getattr(image, "n_frames", 1)
            return Facts(str(kind), width, height, frames, 0, image.mode.startswith(("I", "F")), None)
    except Exception:  # Pillow's readers raise most of Python's exceptions for broken files
        raise ImageError(Reason.CORRUPT, "the file's header cannot be read; save or export it again") from None
