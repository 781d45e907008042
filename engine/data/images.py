"""Decodes an image file of any accepted format into RGB pixels, or says in one word why not.

Knows bytes and formats; does not know data sets, models or the size that a model wants.

The order is fixed: size in bytes, format by its first bytes, declared width, height and frames, then the raster.
Formats outside the allow-list reach no parser at all.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Protocol

import numpy as np

from miss.engine.data.errors import ImageError, ImageLimits, Reason

__all__ = [
    "ACCEPTED",
    "ImageError",
    "ImageLimits",
    "ImageSource",
    "Reason",
    "declared_pixels",
    "decode_image",
    "read_image",
    "sniff",
]

ACCEPTED = "PNG, JPEG, WebP, BMP, TIFF or DICOM"
RASTER = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
DEFAULT_LIMITS = ImageLimits()

# What people send besides, so that the message can name it. (offset, bytes, name)
REFUSED = (
    (0, b"GIF8", "GIF"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x00\x00\x01\x00", "icon (ICO)"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (0, b"P4", "PNM"),
    (0, b"P5", "PNM"),
    (0, b"P6", "PNM"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x89HDF", "HDF5"),
    (0, b"NRRD", "NRRD"),
    (344, b"n+1\x00", "NIfTI"),
    (0, b"%!PS", "PostScript"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
)
BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)


class ImageSource(Protocol):
    """Anything that hands out an encoded image, as a packed data set does."""

    def read_bytes(self) -> bytes: ...


def decode_image(
    source: "str | Path | bytes | ImageSource",
    *,
    frame: int | None = None,
    window: tuple[float, float] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> np.ndarray:
    """An image as RGB pixels, uint8 (H, W, 3).

    Transparent images are composited on black; EXIF rotation is applied; 16-bit and float images are rescaled from
    their own smallest and largest value; colour profiles are not applied.

    Args:
        source: a path, the encoded bytes, or an object with `read_bytes()`.
        frame: which frame, from 0. Default: the first of an animation or of pages, the middle one of a DICOM series.
        window: (centre, width) in the image's own units after rescaling, for DICOM, 16-bit and float images.
            Default: DICOM's own, or the 0.5 and 99.5 percentiles.
        limits: what may be declared.

    Raises:
        ImageError: it cannot be decoded; `reason` says why.
    """
    data = read_image(source, limits)
    kind = sniff(data)
    if kind is None:
        raise _unknown(data)
    if kind == "DICOM":
        from miss.engine.data.dicom import decode_dicom

        return decode_dicom(data, frame, window, limits)
    from miss.engine.data.raster import decode_raster

    return decode_raster(data, kind, frame, window, limits)


def declared_pixels(source: "str | Path | bytes | ImageSource", limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """How many pixels decoding an image may put into memory at most, by its header; 0 of what is not decoded at all.
    Of DICOM, whose header is the file: as many as are accepted.

    Raises:
        ImageError: the image cannot be read.
    """
    data = read_image(source, limits)
    kind = sniff(data)
    if kind is None:
        return 0
    if kind == "DICOM":
        return limits.max_pixels
    from miss.engine.data.raster import declared_size

    width, height = declared_size(data, kind)
    return min(width * height, limits.max_pixels)


def sniff(data: bytes) -> str | None:
    """The accepted format that the first bytes announce: PNG, JPEG, WEBP, BMP, TIFF, DICOM, or None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    # Before TIFF: a DICOM file may carry a TIFF header in its preamble, and its own rescaling is the right one.
    if data[128:132] == b"DICM" or _is_bare_dicom(data):
        return "DICOM"
    if data[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
        return "TIFF"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in BMP_HEADER_SIZES:
        return "BMP"
    return None


def _is_bare_dicom(data: bytes) -> bool:
    """Old DICOM files start without preamble with group 0002 or 0008, in either byte order."""
    little = data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00"
    big = data[:4] in (b"\x00\x08\x00\x00", b"\x00\x08\x00\x05", b"\x00\x08\x00\x08", b"\x00\x08\x00\x16")
    return len(data) > 16 and (little or big)


def read_image(source: "str | Path | bytes | ImageSource", limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """The encoded bytes of an image, not yet looked at.

    Raises:
        ImageError: there is no such file, it cannot be read, or it has no or too many bytes.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        limits.check_bytes(len(source))
        return bytes(source)
    if isinstance(source, str | Path):
        return _read_file(source, limits)
    data = source.read_bytes()
    limits.check_bytes(len(data))
    return data


def _read_file(path: str | Path, limits: ImageLimits) -> bytes:
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise ImageError(Reason.IS_DIRECTORY, f"{name} is a folder; give one image file ({ACCEPTED})")
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device could block, or never end
            raise ImageError(Reason.UNREADABLE, f"{name} is not a regular file; give one image file ({ACCEPTED})")
        limits.check_bytes(status.st_size)
        with open(name, "rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise _file_error(name, error) from None
    except ValueError as error:
        if isinstance(error, ImageError):
            raise
        # A NUL character: no file has such a name.
        raise ImageError(
            Reason.NOT_FOUND, "the image's path holds a character that no file name has; check it"
        ) from None
    limits.check_bytes(len(data))
    return data


def _file_error(name: str, error: OSError) -> ImageError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return ImageError(Reason.NO_PERMISSION, f"{name} may not be read; change its permissions")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return ImageError(Reason.NOT_FOUND, f"no file {name[:200]}; check the path")
    return ImageError(Reason.UNREADABLE, f"{name} cannot be read; check the disk or copy the file")


def _unknown(data: bytes) -> ImageError:
    for offset, magic, name in REFUSED:
        if data[offset : offset + len(magic)] == magic:
            return ImageError(
                Reason.UNSUPPORTED_FORMAT, f"the file is {name}; accepted: {ACCEPTED}; convert it to one of these"
            )
    if any(magic.startswith(data) for magic in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\x00")):
        return ImageError(Reason.TRUNCATED, f"the file ends after {len(data)} bytes; give the whole file")
    return ImageError(
        Reason.NOT_AN_IMAGE, f"the content is not an image that is known here; accepted: {ACCEPTED}, told by content"
    )
