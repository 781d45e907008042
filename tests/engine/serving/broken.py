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


def dicom(text, bits=8, size=(16, 16), **tags):
    """A file with the text in its tags, of so many bits a value; tags: what to say instead."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        SecondaryCaptureImageStorage,
        generate_uid("1.2.", [text]),
    )
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    found.SOPClassUID, found.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    found.PatientName = found.PatientID = found.StudyDescription = text
    found.Columns, found.Rows = size
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated = found.BitsStored = bits
    found.HighBit, found.PixelRepresentation = bits - 1, 0
    found.PixelData = np.random.default_rng(5).bytes(size[0] * size[1] * bits // 8)
    for name, value in tags.items():
        setattr(found, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, found, enforce_file_format=True)
    return file.getvalue()


def burned_in(told):
    """A DICOM file that says so of text in its pixels, or nothing."""
    return dicom("x") if told is None else dicom("x", BurnedInAnnotation=told)


def whole():
    """(name, bytes) of images that are what they seem."""
    for mode in ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"):
        yield f"png-{mode}", picture(mode)
    for mode in ("RGB", "L", "CMYK"):
        yield f"jpeg-{mode}", picture(mode, kind="JPEG")
    yield "webp", picture(kind="WEBP")
    yield "bmp", picture(kind="BMP")
    yield "tiff", picture(kind="TIFF")
    for bits in (8, 16):
        yield f"dicom-{bits}", dicom("name", bits)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        yield f"exif-{turn}", picture(kind="JPEG", exif=exif)


def corpus(cuts=64, flips=40, seed=7):
    """(name, bytes): many of each kind; with the defaults over 2,000."""
    good = list(whole())
    random = np.random.default_rng(seed)
    for name, data in good:
        yield name, data
        for part in range(cuts):
            yield f"{name}-cut-{part}", data[: len(data) * part // cuts]
        for flip in range(flips):
            yield f"{name}-flip-{flip}", flipped(data, random, 1 + flip % 4, len(data) if flip % 2 else 64)
    yield from lies(good)


def flipped(data, random, count, within):
    """Bits turned in the first so many bytes, where headers are, or anywhere."""
    damaged = bytearray(data)
    for _ in range(count):
        damaged[random.integers(min(within, len(damaged)))] ^= 1 << int(random.integers(8))
    return bytes(damaged)


def giants():
    """(name, bytes): headers that declare far more than there is."""
    yield "wide", png_that_declares(50_000, 50_000)
    yield "tall", png_that_declares(1, 2**31 - 1)
    yield "giant-bmp", resized(picture(kind="BMP"), 18, "<ii", 2**31 - 1, 2**31 - 1)
    jpeg = picture(kind="JPEG")
    yield "giant-jpeg", resized(jpeg, jpeg.index(b"\xff\xc0") + 5, ">HH", 65_535, 65_535)
    webp = picture(kind="WEBP")
    yield "giant-webp", resized(webp, 26, "<HH", 16_383, 16_383)
    yield "giant-webp-length", resized(webp, 4, "<I", 2**32 - 1)
    gif = picture(kind="GIF")
    yield "giant-gif", resized(gif, 6, "<HH", 65_535, 65_535)
    yield "giant-dicom", dicom("name", Rows=65_535, Columns=65_535)
    yield "giant-frames", dicom("name", NumberOfFrames=2**31 - 1)
    yield "giant-bits", dicom("name", BitsAllocated=64)
    tiff = picture(kind="TIFF")
    yield "giant-tiff", resized(tiff, tiff.index(struct.pack("<HHI", 256, 4, 1)) + 8, "<I", 2**32 - 1)


def resized(data, at, layout, *values):
    """Other numbers at a place of a file."""
    made = struct.pack(layout, *values)
    return data[:at] + made + data[at + len(made) :]


def polyglots(good):
    """(name, bytes): files that are two things, or begin as another."""
    magics = {
        "png": b"\x89PNG\r\n\x1a\n",
        "jpeg": b"\xff\xd8\xff\xe0",
        "gif": b"GIF89a",
        "bmp": b"BM",
        "tiff": b"II*\0",
    }
    for name, data in good:
        yield f"{name}-and-zip", data + b"PK\x03\x04" + bytes(50)
        for kind, magic in magics.items():
            yield f"{name}-as-{kind}", magic + data[len(magic) :]
    named = dict(good)
    yield "tiff-in-dicom", resized(named["dicom-8"], 0, "4sI", b"II*\0", 8)
    yield "png-in-dicom", named["png-L"][:128].ljust(128, b"\0") + named["dicom-8"][128:]
    yield "png-then-jpeg", named["png-RGB"][:-12] + named["jpeg-RGB"]


def lies(good):
    yield from giants()
    yield from polyglots(good)
    yield "nothing", png_that_declares(0, 0)
    yield "bomb", png_that_declares(900, 900, b"\0" * (900 * 2701))
    yield "longer", png_that_declares(10, 10, b"\0" * 10_000_000)
    bomb = b"Comment\0\0" + zlib.compress(b"A" * 50_000_000)
    yield "text-bomb", png_that_declares(10, 10, b"\0" * 310, [(b"zTXt", bomb)])
    yield "text", b"canary text that is no image"
    gif = picture(kind="GIF")
    yield "gif", gif
    for part in range(64):
        yield f"gif-cut-{part}", gif[: len(gif) * part // 64]
    yield "pdf", b"%PDF-1.7\n" + bytes(100)
    yield "postscript", b"%!PS-Adobe-3.0\n(canary) show\n"
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "zip", b"PK\x03\x04" + bytes(100)
    yield "gzip", b"\x1f\x8b" + bytes(100)
    yield "dicom-empty", bytes(128) + b"DICM"
    yield "dicom-noise", bytes(128) + b"DICM" + np.random.default_rng(1).bytes(5000)
    yield "dicom-length", bytes(128) + b"DICM\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\xff"
    frames = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(30)]
    file = io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    yield "pages", file.getvalue()
