"""The process that decodes what strangers send: a line of JSON and the image's bytes in, pixels or a refusal out.

Knows formats, and its own limits of memory and files; does not know who asks. Never imports torch, writes no file, and
prints nothing: what a library would say of an image may hold its tags.
"""

import contextlib
import fcntl
import json
import os
import resource
import signal
import sys
import warnings
from dataclasses import asdict
from typing import Any

from miss.engine.data.decoding import HEADER, MISTAKE, PIXELS, REFUSED
from miss.engine.data.errors import ImageError, ImageLimits
from miss.engine.data.facts import image_facts
from miss.engine.data.images import decode_image, sniff
from miss.engine.data.processor import stretch
from miss.engine.serving.logs import places
from miss.models.config import PreprocessConfig

PIPE = 1 << 19  # bytes: most files, and a decoded image, in one write
TOO_HUNGRY = "image_too_hungry"


def main(preprocess: PreprocessConfig, limits: ImageLimits, memory: int) -> None:
    """Answers until the input ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle: it closes the input
        signal.signal(name, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux
        for pipe in (0, answers.fileno()):
            with contextlib.suppress(OSError):  # a socket, or no more is allowed: an image takes several writes
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")
    stretch(decode_image(_first()), preprocess)  # its libraries are loaded before memory is bounded
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        kind, data = answer(sys.stdin.buffer.read(asked["bytes"]), asked, preprocess, limits)
        try:
            answers.write(HEADER.pack(kind, len(data)) + data)
            answers.flush()
        except BrokenPipeError:  # nobody is left to read it
            os._exit(0)


def _first() -> bytes:
    """A BMP of one pixel."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    size = b"".join(n.to_bytes(4, "little") for n in (40, 1, 1))
    return header + size + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24) + bytes(4)


def answer(data: bytes, asked: dict[str, Any], preprocess: PreprocessConfig, limits: ImageLimits) -> tuple[int, bytes]:
    """The kind of answer and its bytes: pixels uint8 (S, S, 3), one more byte where the file says that text is burned
    into them, or what was asked instead of them; a word; or of a mistake of ours its type and place, for the log."""
    window = None if asked["window"] is None else tuple(asked["window"])
    try:
        if asked["facts"]:
            return PIXELS, json.dumps(asdict(image_facts(data, limits))).encode()
        pixels = decode_image(data, frame=asked["frame"], window=window, limits=limits)  # type: ignore[arg-type]
        noted = sniff(data) == "DICOM" and _says_burned_in(data, limits)
        return PIXELS, stretch(pixels, preprocess).tobytes() + b"!" * noted
    except ImageError as error:
        return REFUSED, error.reason.value.encode()
    except MemoryError:
        return REFUSED, TOO_HUNGRY.encode()
    except Exception as error:  # the readers say what is wrong with an image by ImageError: this is not its fault
        return MISTAKE, json.dumps({"exception": type(error).__name__, "at": places(error.__traceback__)}).encode()


def _says_burned_in(data: bytes, limits: ImageLimits) -> bool:
    from miss.engine.data.dicom import says_burned_in

    return says_burned_in(data, limits)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(PreprocessConfig(**given["preprocess"]), ImageLimits(**given["limits"]), given["memory"])
