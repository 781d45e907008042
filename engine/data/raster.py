"""PNG, JPEG, WebP, BMP and TIFF through Pillow, in any of its modes, as RGB pixels.

Knows Pillow; does not know files, DICOM, or what the pixels are for.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageFile

from miss.engine.data.errors import ImageError, ImageLimits, Reason, check_frame, is_our_mistake

# Pillow's own guard against decompression bombs stays on; what it would only warn of is an error here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL(\.|$)")  # of odd metadata; the pixels are whole
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

EXIF_ORIENTATION = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TIFF_PHOTOMETRIC, TIFF_OFFSETS, TIFF_COUNTS = 262, 273, 279
BLACK = (0, 0, 0)


def decode_raster(
    data: bytes, kind: str, frame: int | None, window: tuple[float, float] | None, limits: ImageLimits
) -> np.ndarray:
    """One frame of an encoded image, uint8 (H, W, 3); `kind` is Pillow's name of the one format that is tried.

    Raises:
        ImageError: it is truncated, corrupt, or outside the limits.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "half an image must never be taken for a whole one"
    image: Image.Image | None = None
    try:
        image = Image.open(io.BytesIO(data), formats=(kind,))
        limits.check_size(*image.size)
        _bomb_guard(image)
        _choose_frame(image, kind, frame, limits)
        image.load()
        return to_rgb(_upright(image), window)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            Reason.TOO_MANY_PIXELS,
            f"the image declares more pixels than any that is decoded; accepted: up to {limits.max_pixels:,} pixels; "
            f"scale it down first",
        ) from None
    except MemoryError:
        raise ImageError(Reason.TOO_LARGE, "the image needs more memory than there is; scale it down first") from None
    except Exception as error:  # Pillow's readers leak ValueError, SyntaxError, struct.error and more for broken files
        if is_our_mistake(error):
            raise
        raise _broken(data, kind, image) from None


def declared_size(data: bytes, kind: str) -> tuple[int, int]:
    """Width and height by the header; (0, 0) where `decode_raster` will say what is wrong with it."""
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            return image.size
    except Exception:  # as above
        return 0, 0


def _bomb_guard(image: Image.Image) -> None:
    # Pillow checks when it opens; this also covers filters that somebody has reset.
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _choose_frame(image: Image.Image, kind: str, frame: int | None, limits: ImageLimits) -> None:
    if kind == "TIFF":
        # Counting pages means walking through all of them; only the one that is asked for is looked up.
        if frame:
            limits.check_frames(frame + 1)
            try:
                image.seek(check_frame(frame, limits.max_frames))
            except EOFError:
                raise ImageError(Reason.NO_SUCH_FRAME, f"the image has no frame {frame}; count from 0") from None
            limits.check_size(*image.size)
        elif frame is not None:
            check_frame(frame, 1)
        return
    num_frames = getattr(image, "n_frames", 1)
    limits.check_frames(num_frames)
    image.seek(check_frame(frame or 0, num_frames))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; EXIF that cannot be read turns nothing."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # the pixels are whole: damaged metadata is no reason to refuse them
        return image
    method = ORIENTATIONS.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else _keeping_tags(image, image.transpose(method))


def _keeping_tags(image: Image.Image, turned: Image.Image) -> Image.Image:
    if is_white_zero(image):
        turned.info["white_is_zero"] = True
    return turned


def is_white_zero(image: Image.Image) -> bool:
    """Whether a 16-bit TIFF counts from white to black; Pillow turns only the 8-bit ones round."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.mode.startswith("I;16") and tags.get(TIFF_PHOTOMETRIC) == 0:
        return True
    return bool(image.info.get("white_is_zero"))


def to_rgb(image: Image.Image, window: tuple[float, float] | None = None) -> np.ndarray:
    """A Pillow image of any mode as uint8 (H, W, 3); alpha is composited on black.

    Raises:
        ImageError: a window is given for 8-bit pixels, or a float image has no finite value.
    """
    if image.mode.startswith(("I", "F")):
        grey = to_uint8(np.asarray(image).astype(np.float64), window)
        return grey_to_rgb(255 - grey if is_white_zero(image) else grey)
    if window is not None:
        raise ImageError(
            Reason.BAD_OPTION, "a window was given for an 8-bit image; it is for DICOM, 16-bit and float images"
        )
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_black(image)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _on_black(image: Image.Image) -> np.ndarray:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*BLACK, 255))
    return np.array(Image.alpha_composite(canvas, image).convert("RGB"), dtype=np.uint8)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None
    return converted


def to_uint8(values: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Grey values (H, W), any range, as uint8: the smallest becomes 0 and the largest 255, or by window.

    Values that are not finite take the nearest finite extreme (NaN the smallest). Of one value alone, all is 0.

    Raises:
        ImageError: nothing is finite, or the window's width is not above 0.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ImageError(Reason.CORRUPT, "the image holds no finite value; export it again")
    if window is not None:
        low, high = window_range(window)
    else:
        inside = values if finite.all() else values[finite]
        low, high = float(inside.min()), float(inside.max())
    if not finite.all():
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return stretch(values, low, high)


def window_range(window: tuple[float, float]) -> tuple[float, float]:
    """The values that become 0 and 255 (linear, exact).

    Raises:
        ImageError: the width is not above 0, or a number is not finite.
    """
    centre, width = window
    if not (np.isfinite(centre) and np.isfinite(width) and width > 0):
        raise ImageError(Reason.BAD_OPTION, f"window: got {centre}, {width}; wanted a centre and a width above 0")
    return centre - width / 2, centre + width / 2


def stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`low` … `high` to 0 … 255, rounded, what lies outside cut off; uint8. With low >= high all is 0."""
    if not high > low:
        return np.zeros(values.shape, dtype=np.uint8)
    # Divided first: the difference of two extreme floats may overflow where their halves do not.
    scaled = (values / 2 - low / 2) / (high / 2 - low / 2)
    return np.rint(np.clip(scaled, 0.0, 1.0) * 255.0).astype(np.uint8)


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """uint8 (H, W) -> uint8 (H, W, 3)."""
    return np.repeat(grey[:, :, None], 3, axis=2)


def _broken(data: bytes, kind: str, image: Image.Image | None) -> ImageError:
    name = {"WEBP": "WebP"}.get(kind, kind)
    if _is_cut(data, kind, image):
        return ImageError(
            Reason.TRUNCATED, f"the {name} file ends early, after {len(data):,} bytes; give the whole file"
        )
    return ImageError(Reason.CORRUPT, f"the file begins as {name} but cannot be decoded; save or export it again")


def _is_cut(data: bytes, kind: str, image: Image.Image | None) -> bool:
    """Whether the end is missing, by what each format says about its length."""
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "JPEG":
        return not data.rstrip(b"\x00\r\n ").endswith(b"\xff\xd9")
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data) or len(data) < 26
    return _is_cut_tiff(data, image)


def _is_cut_tiff(data: bytes, image: Image.Image | None) -> bool:
    order = "little" if data[:2] == b"II" else "big"
    if len(data) < 8 or int.from_bytes(data[4:8], order) + 2 > len(data):  # type: ignore[arg-type]
        return True
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return False
    try:
        return any(o + c > len(data) for o, c in zip(tags[TIFF_OFFSETS], tags[TIFF_COUNTS], strict=False))
    except Exception:  # tags that cannot be read say nothing about the length
        return False
