"""What the server and its engine's process say to each other: JSON, and raw bytes beside it. Nothing is unpickled.

Knows lengths and JSON; does not know what is said.

A frame: two lengths, little-endian, of the JSON and of the bytes, and then these.
"""

import asyncio
import json
import struct
from typing import Any

LENGTHS = struct.Struct("<II")
MOST = 1 << 30


def write(writer: asyncio.StreamWriter, message: dict[str, Any], data: bytes = b"") -> None:
    """Puts a frame into the writer's buffer."""
    text = json.dumps(message, separators=(",", ":")).encode()
    writer.write(LENGTHS.pack(len(text), len(data)) + text)
    if data:
        writer.write(data)


async def read(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame.

    Raises:
        EOFError: the other side has ended (`asyncio.IncompleteReadError` is one), or speaks another language.
    """
    num_text, num_data = LENGTHS.unpack(await reader.readexactly(LENGTHS.size))
    if num_text > MOST or num_data > MOST:
        raise EOFError("a frame of a size that is never written")
    message = json.loads(await reader.readexactly(num_text))
    return message, await reader.readexactly(num_data) if num_data else b""
