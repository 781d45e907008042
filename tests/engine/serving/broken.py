"""Images that are not quite images, by script: cut, flipped, mislabelled, lying about their size, of odd modes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(mode="RGB", size=(48, 36), kind="PNG", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_declares(width, height, data=b"", chunks=()):
    """A PNG whose header says so and whose raster is `data`."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    inner = b"".join(chunk(name, body) for name, body in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + inner
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def whole():
    """(name, bytes) of images that are what they seem."""
    for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"):
        yield f"png-{mode}", picture(mode)
    for mode in ("RGB", "L", "CMYK"):
        yield f"jpeg-{mode}", picture(mode, kind="JPEG")
    yield "webp", picture(kind="WEBP")
    yield "bmp", picture(kind="BMP")
    yield "tiff", picture(kind="TIFF")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"exif-{turn}", picture(kind="JPEG", exif=exif)


def corpus(cuts=64, flips=40):
    """(name, bytes): many of each kind; with the defaults over 2,000."""
    good = list(whole())
    random = np.random.default_rng(7)
    for name, data in good:
        yield name, data
        for part in range(cuts):
            yield f"{name}-cut-{part}", data[: len(data) * part // cuts]
        for flip in range(flips):
            damaged = bytearray(data)
            for _ in range(1 + flip % 4):
                damaged[random.integers(len(damaged))] ^= 1 << int(random.integers(8))
            yield f"{name}-flip-{flip}", bytes(damaged)
    yield from lies(good)


def lies(good):
    yield "wide", png_that_declares(50_000, 50_000)
    yield "tall", png_that_declares(1, 2**31 - 1)
    yield "nothing", png_that_declares(0, 0)
    yield "bomb", png_that_declares(900, 900, b"\0" * (900 * 2701))
    yield "longer", png_that_declares(10, 10, b"\0" * 10_000_000)
    bomb = b"Comment\0\0" + zlib.compress(b"A" * 50_000_000)
    yield "text-bomb", png_that_declares(10, 10, b"\0" * 310, [(b"zTXt", bomb)])
    yield "text", b"canary text that is no image"
    yield "gif", b"GIF89a" + bytes(100)
    yield "pdf", b"%PDF-1.7\n" + bytes(100)
    yield "postscript", b"%!PS-Adobe-3.0\n(canary) show\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "zip", b"PK\x03\x04" + bytes(100)
    yield "gzip", b"\x1f\x8b" + bytes(100)
    yield "dicom-empty", bytes(128) + b"DICM"
    yield "dicom-noise", bytes(128) + b"DICM" + np.random.default_rng(1).bytes(5000)
    yield "dicom-length", bytes(128) + b"DICM\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\xff"
    for name, data in good:
        yield f"{name}-and-zip", data + b"PK\x03\x04" + bytes(50)
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(30)]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    yield "pages", file.getvalue()
