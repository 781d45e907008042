"""`python -m tests.fuzz.dicom -max_total_time=600`: any bytes as DICOM, past the check of what they look like.

Knows that only ImageError may come of it; does not know tags. pydicom is instrumented, compiled decoders are not.
"""

import warnings

from tests.fuzz.harness import fuzz, instrumented

with instrumented(__name__, "miss.engine.data", "pydicom"):
    import pydicom  # noqa: F401  (instrumented before our reader imports it)

    from miss.engine.data.dicom import decode_dicom
    from miss.engine.data.errors import ImageError, ImageLimits

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, max_side=8192, max_frames=64)
START = bytes(128) + b"DICM"


def one_input(data: bytes) -> None:
    """The first byte chooses a frame, a window and whether the file's first 132 bytes are put before the others."""
    choice = data[0] if data else 0
    frame = choice >> 4 if choice & 1 else None
    window = (40.0, float(choice)) if choice & 2 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom says much of broken files
        try:
            pixels = decode_dicom((START if choice & 4 else b"") + data[1:], frame, window, LIMITS)
        except ImageError:
            return
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype.name == "uint8"
    assert 0 < pixels.shape[0] * pixels.shape[1] <= LIMITS.max_pixels


if __name__ == "__main__":
    fuzz(one_input, "dicom")
