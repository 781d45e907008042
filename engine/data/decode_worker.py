"""The process that decodes images for another one: requests on its input, pixels on its output.

Knows how a request and an answer are written (decoding.py says it); does not know who asks. Never imports torch.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from miss.engine.data.augment import View
from miss.engine.data.decoding import HEADER, PIXELS, REFUSED, decode_view
from miss.engine.data.errors import ImageError
from miss.engine.data.shards import PackedImage
from miss.models.config import PreprocessConfig


def main(preprocess: PreprocessConfig) -> None:
    """Answers until the input ends. What anything prints goes to stderr; signals to the group are the parent's."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        kind, data = answer(json.loads(line), preprocess)
        try:
            answers.write(HEADER.pack(kind, len(data)) + data)
            answers.flush()
        except BrokenPipeError:  # nobody is left to read it
            os._exit(0)


def answer(request: dict[str, Any], preprocess: PreprocessConfig) -> tuple[int, bytes]:
    """The kind of answer and its bytes."""
    given = request["image"]
    image = PackedImage(**{**given, "shard": Path(given["shard"])}) if isinstance(given, dict) else Path(given)
    try:
        return PIXELS, decode_view(image, View(**request["view"]), preprocess).tobytes()
    except ImageError as error:
        return REFUSED, json.dumps({"reason": error.reason, "message": str(error)}).encode()


if __name__ == "__main__":
    main(PreprocessConfig(**json.loads(sys.argv[1])))
