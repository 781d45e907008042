"""What the server and its engine's process say to each other: JSON, and raw bytes beside it. Nothing is unpickled.

Knows lengths and JSON; does not know what is said.

A frame: two lengths, little-endian, of the JSON and of the bytes, and then these.
"""

import asyncio
import json
import socket
import struct
from typing import Any

LENGTHS = struct.Struct("<II")
MOST = 1 << 30
TOGETHER = 1 << 14  # bytes that are worth a copy, so that a frame is one write


def _pack(message: dict[str, Any], num_data: int) -> bytes:
    text = json.dumps(message, separators=(",", ":")).encode()
    return LENGTHS.pack(len(text), num_data) + text


def write(writer: asyncio.StreamWriter, message: dict[str, Any], data: bytes = b"") -> None:
    """Puts a frame into the writer's buffer; nothing where the other side has ended, which its reader is told."""
    if writer.is_closing():  # an error with uvloop
        return
    if len(data) < TOGETHER:
        writer.write(_pack(message, len(data)) + data)
    else:
        writer.writelines([_pack(message, len(data)), data])


async def read(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame.

    Raises:
        EOFError: the other side has ended (`asyncio.IncompleteReadError` is one), or speaks another language.
    """
    num_text, num_data = _lengths(await reader.readexactly(LENGTHS.size))
    message = json.loads(await reader.readexactly(num_text))
    return message, await reader.readexactly(num_data) if num_data else b""


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Writes a frame, and waits for room.

    Raises:
        OSError: the other side has ended.
    """
    sock.sendall(_pack(message, 0))


def receive(sock: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """The next frame, waited for; its bytes belong to the caller.

    Raises:
        EOFError: the other side has ended, or speaks another language.
    """
    num_text, num_data = _lengths(_exactly(sock, LENGTHS.size))
    message = json.loads(_exactly(sock, num_text))
    return message, _exactly(sock, num_data)


def _lengths(head: bytes | bytearray) -> tuple[int, int]:
    num_text, num_data = LENGTHS.unpack(head)
    if num_text > MOST or num_data > MOST:
        raise EOFError("a frame of a size that is never written")
    return num_text, num_data


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data, at = bytearray(size), 0
    view = memoryview(data)
    while at < size:
        count = sock.recv_into(view[at:])
        if not count:
            raise EOFError("the other side has ended")
        at += count
    return data
