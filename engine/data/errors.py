"""Why an image cannot be served: a fixed vocabulary of reasons, and the limits that are checked before decoding.

Knows reasons and numbers; does not know any image format.
"""

import traceback
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

OURS = Path(__file__).resolve().parents[1]  # the code whose own mistakes are no image's fault


class Reason(StrEnum):
    """All that can be wrong with an image. The words are part of the interface: programs may compare them."""

    NOT_FOUND = "not_found"
    IS_DIRECTORY = "is_directory"
    NO_PERMISSION = "no_permission"
    UNREADABLE = "unreadable"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TOO_MANY_FRAMES = "too_many_frames"
    NO_SUCH_FRAME = "no_such_frame"
    BAD_OPTION = "bad_option"
    MISSING_DECODER = "missing_decoder"


class ImageError(ValueError):
    """An image that cannot be served.

    `reason` says why in one word of `Reason`. The message says what came, what is accepted and what to do; it never
    repeats what a library said, so that nothing of the machine leaks through it.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def is_our_mistake(error: Exception) -> bool:
    """Whether our own code is wrong, whatever the image holds: a name that is not there, an assertion that fails in it.

    Other exceptions are taken for the image's: broken files make libraries, and our own lines, raise most of the rest.
    """
    if not isinstance(error, NameError | AssertionError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(OURS)


@dataclass(frozen=True)
class ImageLimits:
    """What an image may declare before anything is allocated for it.

    max_bytes: the encoded size. max_pixels, max_side, min_side: one frame. max_frames: of animations and DICOM series.
    """

    max_bytes: int = 256 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 32_768
    min_side: int = 1
    max_frames: int = 4_096

    def check_bytes(self, num_bytes: int) -> None:
        """Raises ImageError for nothing at all, or for more than `max_bytes`."""
        if num_bytes == 0:
            raise ImageError(Reason.EMPTY, "the image is empty (0 bytes); give a whole image file")
        if num_bytes > self.max_bytes:
            raise ImageError(
                Reason.TOO_LARGE,
                f"the image has {num_bytes:,} bytes; accepted: up to {self.max_bytes:,}; store it smaller",
            )

    def check_size(self, width: int, height: int) -> None:
        """Raises ImageError where a frame's declared size is outside the limits."""
        if min(width, height) < max(1, self.min_side):
            raise ImageError(
                Reason.TOO_SMALL,
                f"the image is {width} x {height} pixels; accepted: sides of at least {max(1, self.min_side)}",
            )
        if width * height > self.max_pixels or max(width, height) > self.max_side:
            raise ImageError(
                Reason.TOO_MANY_PIXELS,
                f"the image declares {width:,} x {height:,} pixels; accepted: up to {self.max_pixels:,} pixels and "
                f"{self.max_side:,} a side; scale it down first",
            )

    def check_frames(self, num_frames: int) -> None:
        """Raises ImageError where there are more frames than `max_frames`."""
        if num_frames > self.max_frames:
            raise ImageError(
                Reason.TOO_MANY_FRAMES,
                f"the image declares {num_frames:,} frames; accepted: up to {self.max_frames:,}; export the one to ask "
                f"about",
            )


def check_frame(frame: int, num_frames: int) -> int:
    """`frame`, counted from 0, where it exists.

    Raises:
        ImageError: it does not.
    """
    if not 0 <= frame < num_frames:
        raise ImageError(
            Reason.NO_SUCH_FRAME,
            f"frame {frame} of an image that has {num_frames:,}; accepted: 0 to {num_frames - 1:,}",
        )
    return frame
