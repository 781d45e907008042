"""`POST /v1/image`: an image as the model sees it, and what its file says of its frames and its window.

Knows this route's request and response; does not know how images are decoded, or questions.
"""

import asyncio
import base64
import struct
import time
import zlib
from typing import Annotated

from pydantic import BaseModel, Field
from starlette.requests import Request

from miss.engine.serving.bodies import read_form, read_json
from miss.engine.serving.gate import Exchange
from miss.engine.serving.images import from_base64, from_data_url
from miss.engine.serving.problems import Refused
from miss.engine.serving.protocol import Finite, Model
from miss.engine.serving.service import SLACK, Service


class Viewing(Model):
    """Which of an image's frames, in which window."""

    frame: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(None, description="Of a series, from 0.")
    window: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = Field(
        None, description="(centre, width) for DICOM, 16-bit and float images, in the image's units."
    )
    timeout: Annotated[Finite, Field(gt=0)] | None = Field(None, description="Seconds; at most the server's own.")


class ImageRequest(Viewing):
    """One image."""

    image: str = Field(description="A data: URL with base64, or base64 alone.")


class ImageForm(Viewing):
    """One image as a file."""

    image: str = Field(json_schema_extra={"format": "binary"})


class ImageResponse(BaseModel):
    """png: a data: URL of the very pixels that the model is given, `size` a side, stretched to a square.

    format, width, height: of the file's frame. num_frames: null where it is not counted (TIFF). frame: the one shown.
    windowed: whether a window may be given. window: the one applied, null where percentiles or a table decide.
    """

    id: str
    png: str
    size: int
    format: str
    width: int
    height: int
    num_frames: int | None
    frame: int
    windowed: bool
    window: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    seconds: float


async def image_as_seen(request: Request, service: Service) -> ImageResponse:
    """
    Raises:
        Refused: the image is wrong, or there is no room or no time.
    """
    exchange: Exchange = request.scope["miss"]
    asked, image = await _read(request)
    deadline = service.deadline(exchange, request.headers.get("x-request-timeout"), asked.timeout)
    if service.images is None:
        raise Refused("not_ready")
    size = service.about["preprocess"]["image_size"]
    window = None if asked.window is None else (asked.window[0], asked.window[1])
    with service.admission.hold(1, size * size):
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + SLACK):
                exchange.stage, start = "image", time.monotonic()
                pixels = await service.images.decode(image, asked.frame, window)
                service.metrics.took("image_decode_seconds", time.monotonic() - start)
                facts = await service.images.facts(image)
                drawn = base64.b64encode(await asyncio.to_thread(png, pixels, size)).decode()
        except TimeoutError:
            raise Refused("deadline") from None
    if asked.frame is not None:
        facts["frame"] = asked.frame
    if window is not None:
        facts["window"] = window
    seconds = round(time.monotonic() - exchange.arrived, 6)
    return ImageResponse(id=exchange.id, png=f"data:image/png;base64,{drawn}", size=size, seconds=seconds, **facts)


async def _read(request: Request) -> tuple[Viewing, bytes]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind == "multipart/form-data":
        form, image = await read_form(ImageForm, request.headers, body)
        if not image:
            raise Refused("image_empty", "image")
        return form, image
    if kind != "application/json":
        raise Refused("unsupported_media_type")
    asked = read_json(ImageRequest, body)
    read = from_data_url if asked.image[:5].lower() == "data:" or "://" in asked.image[:16] else from_base64
    return asked, read(asked.image)


def png(pixels: bytes, size: int) -> bytes:
    """RGB pixels of a square as a PNG file. Fast rather than small: it is looked at once."""
    rows = b"".join(b"\0" + pixels[at : at + 3 * size] for at in range(0, len(pixels), 3 * size))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
