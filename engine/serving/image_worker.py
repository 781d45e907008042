"""The process that decodes what strangers send: a line of JSON and the image's bytes in, pixels or a refusal out.

Knows formats, and its own limits of memory and files; does not know who asks. Never imports torch, writes no file, and
prints nothing: what a library would say of an image may hold its tags.
"""

import json
import os
import resource
import signal
import sys
import warnings
from dataclasses import asdict
from typing import Any

from miss.engine.data.decoding import HEADER, PIXELS, REFUSED
from miss.engine.data.errors import ImageError, ImageLimits
from miss.engine.data.facts import image_facts
from miss.engine.data.images import decode_image
from miss.engine.data.processor import stretch
from miss.models.config import PreprocessConfig

TOO_HUNGRY, DAMAGED = "image_too_hungry", "image_corrupt"


def main(preprocess: PreprocessConfig, limits: ImageLimits, memory: int) -> None:
    """Answers until the input ends."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the parent's to handle: it closes the input
        signal.signal(name, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
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
    """The kind of answer and its bytes: pixels uint8 (S, S, 3) or what was asked instead of them, or a word."""
    window = None if asked["window"] is None else tuple(asked["window"])
    try:
        if asked["facts"]:
            return PIXELS, json.dumps(asdict(image_facts(data, limits))).encode()
        pixels = decode_image(data, frame=asked["frame"], window=window, limits=limits)  # type: ignore[arg-type]
        return PIXELS, stretch(pixels, preprocess).tobytes()
    except ImageError as error:
        return REFUSED, error.reason.value.encode()
    except MemoryError:
        return REFUSED, TOO_HUNGRY.encode()
    except Exception:  # whatever a decoder lets out of a stranger's bytes: it is the bytes' fault, and costs only them
        return REFUSED, DAMAGED.encode()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(PreprocessConfig(**given["preprocess"]), ImageLimits(**given["limits"]), given["memory"])
