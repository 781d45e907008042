"""`python -m tests.fuzz.image -max_total_time=600`: any bytes as an image, through the decoder of uploads.

Knows that only ImageError may come of it; does not know formats. Python's part of Pillow is instrumented, its C is not.
"""

from tests.fuzz.harness import fuzz, instrumented

with instrumented(__name__, "miss.engine.data", "PIL"):
    from miss.engine.data.errors import ImageError, ImageLimits
    from miss.engine.data.images import declared_pixels, decode_image
    from miss.engine.data.processor import stretch
    from miss.models.config import PreprocessConfig

LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1_000_000, max_side=8192, max_frames=64)
SMALL = PreprocessConfig(image_size=28)


def one_input(data: bytes) -> None:
    """The first byte chooses a frame and a window, the others are the file."""
    choice, data = data[:1], data[1:]
    frame = None if not choice or choice[0] & 1 else choice[0] >> 4
    window = (50.0, float(choice[0])) if choice and choice[0] & 2 else None
    try:
        declared = declared_pixels(data, LIMITS)
        pixels = decode_image(data, frame=frame, window=window, limits=LIMITS)
    except ImageError:
        return
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype.name == "uint8"
    assert 0 < pixels.shape[0] * pixels.shape[1] <= LIMITS.max_pixels
    assert pixels.shape[0] * pixels.shape[1] <= declared or frame
    assert stretch(pixels, SMALL).shape == (28, 28, 3)


if __name__ == "__main__":
    fuzz(one_input, "image")
