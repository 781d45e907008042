"""decode_image: every format and mode to RGB, every broken file to one reason."""

import glob
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from miss.engine.data import dicom
from miss.engine.data.images import ImageError, ImageLimits, Reason, decode_image, sniff

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom and Pillow, about files broken on purpose

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
RNG = np.random.default_rng(0)
PICTURE = np.kron(RNG.integers(0, 255, (6, 5, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 48 x 40, in patches


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refused(source: object, **options: object) -> Reason:
    """The reason, after checking that the message is one clear line that leaks nothing."""
    with pytest.raises(ImageError) as caught:
        decode_image(source, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and (";" in message or ":" in message), message
    for leak in ("0x", "Traceback", "Error(", "cannot identify", "BytesIO", "object at"):
        assert leak not in message
    return caught.value.reason


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


# --- What decodes


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_from_bytes_path_and_string(kind: str, tmp_path: Path) -> None:
    data = encoded(PICTURE, kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "image.of.some.name"
    path.write_bytes(data)
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8 and pixels.shape == (48, 40, 3) and pixels.flags.writeable
    assert np.array_equal(pixels, decode_image(path)) and np.array_equal(pixels, decode_image(str(path)))
    assert np.array_equal(pixels, decode_image(path.open("rb").read()))
    if kind != "JPEG":
        assert np.array_equal(pixels, PICTURE)


def test_a_source_that_hands_out_bytes() -> None:
    class Packed:
        def read_bytes(self) -> bytes:
            return encoded(PICTURE)

    assert np.array_equal(decode_image(Packed()), PICTURE)


MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16L",
         "I;16B", "I;16N", "F")  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_pillow_mode_becomes_rgb(mode: str) -> None:
    from miss.engine.data.raster import to_rgb

    image = Image.new(mode, (7, 5))
    pixels = to_rgb(image)
    assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8


GREY = np.arange(240, dtype=np.uint8).reshape(12, 20)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("1", "TIFF"),
     ("LA", "TIFF"), ("CMYK", "TIFF"), ("CMYK", "JPEG"), ("L", "JPEG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF"),
     ("P", "BMP"), ("1", "BMP"), ("RGBA", "WEBP"), ("LAB", "TIFF"), ("YCbCr", "TIFF"), ("PA", "TIFF")],
)  # fmt: skip
def test_grey_ramp_survives_in_every_mode_of_a_file(mode: str, kind: str) -> None:
    image = Image.fromarray(GREY)
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", (image, Image.new("L", image.size, 128), Image.new("L", image.size, 128)))
    elif mode in ("LA", "RGBA", "PA"):
        image = image.convert("LA") if mode != "RGBA" else image.convert("RGBA")
        image = image.convert("PA") if mode == "PA" else image
    elif mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB").convert(mode)
    else:
        image = image.convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    pixels = decode_image(encoded(image, kind, **options)).astype(int)
    assert pixels.shape == (12, 20, 3)
    if mode == "1":
        assert set(np.unique(pixels)) == {0, 255}
    elif mode in ("I;16", "I", "F"):  # rescaled to the whole range
        assert np.abs(pixels[:, :, 0] - GREY / 239 * 255).max() <= 1
    elif mode == "LAB":  # lightness: monotonous, from black
        assert pixels[0, 0].max() <= 2 and (np.diff(pixels[:, :, 1].ravel()) >= 0).all()
    else:
        assert np.abs(pixels - GREY[:, :, None]).max() <= (6 if kind == "JPEG" else 2)


def test_sixteen_bits_are_rescaled_not_clipped() -> None:
    values = np.linspace(1000, 4095, 300).reshape(15, 20).astype(np.uint16)  # 12 bits in 16
    pixels = decode_image(encoded(values))[:, :, 0].astype(float)
    assert pixels.min() == 0 and pixels.max() == 255
    assert np.abs(pixels - (values - 1000.0) / 3095 * 255).max() <= 0.51
    windowed = decode_image(encoded(values), window=(2000.0, 1000.0))[:, :, 0]
    assert (windowed[values <= 1500] == 0).all() and (windowed[values >= 2500] == 255).all()


def test_sixteen_bit_tiff_that_counts_from_white() -> None:
    values = np.linspace(0, 65535, 300).reshape(15, 20).astype(np.uint16)
    data = encoded(values, "TIFF", tiffinfo={262: 0})
    if Image.open(io.BytesIO(data)).tag_v2[262] != 0:  # type: ignore[attr-defined]
        data = data.replace(struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert np.array_equal(decode_image(data), 255 - decode_image(encoded(values)))


def test_floats_that_are_not_finite() -> None:
    values = np.array([[0.0, 1.0, np.nan], [np.inf, -np.inf, 0.5]], dtype=np.float32)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"))[:, :, 0]
    assert pixels.tolist() == [[0, 255, 0], [255, 0, 128]]
    assert refused(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")) == Reason.CORRUPT
    huge = np.array([[-3e38, 3e38]], dtype=np.float32)
    assert decode_image(encoded(Image.fromarray(huge), "TIFF"))[:, :, 0].tolist() == [[0, 255]]


def test_alpha_is_composited_on_black() -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    image.putpixel((1, 0), (200, 100, 50, 255))
    image.putpixel((2, 0), (200, 100, 50, 128))
    pixels = decode_image(encoded(image))
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[0, 1].tolist() == [200, 100, 50]
    assert np.abs(pixels[0, 2].astype(int) - [100, 50, 25]).max() <= 1
    for image in (Image.new("P", (4, 4), 1), Image.new("L", (4, 4), 1), Image.new("RGB", (4, 4), (1, 1, 1))):
        key = (1, 1, 1) if image.mode == "RGB" else 1
        if image.mode == "P":
            image.putpalette([255, 255, 255] * 256)
        assert decode_image(encoded(image, transparency=key)).max() == 0, image.mode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # white in the upper left
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    from miss.engine.data.raster import ORIENTATIONS

    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(ORIENTATIONS[back[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(stored, kind, exif=exif))
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - upright).max() < 40


def test_damaged_exif_does_not_refuse_whole_pixels() -> None:
    data = encoded(PICTURE, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f garbage")
    assert decode_image(data).shape == (48, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_frames_of_animations_and_pages(kind: str) -> None:
    frames = [Image.fromarray(np.full((9, 8, 3), value, np.uint8)) for value in (10, 90, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).max() == 10
    assert [decode_image(data, frame=i).max() for i in range(3)] == [10, 90, 200]
    assert refused(data, frame=3) == Reason.NO_SUCH_FRAME and refused(data, frame=-1) == Reason.NO_SUCH_FRAME
    if kind != "TIFF":
        assert refused(data, limits=ImageLimits(max_frames=2)) == Reason.TOO_MANY_FRAMES


def test_extra_bytes_at_the_end_and_polyglots_decode_as_what_they_begin_with() -> None:
    page = b"<html><script>alert(1)</script></html>PK\x03\x04" + b"\x00" * 200
    for kind in ("PNG", "JPEG", "BMP", "TIFF"):
        data = encoded(PICTURE, kind)
        assert np.array_equal(decode_image(data + page), decode_image(data)), kind
    assert refused(page + encoded(PICTURE)) == Reason.NOT_AN_IMAGE
    assert sniff(encoded(PICTURE)[:128] + b"DICM") == "PNG"
    assert refused(b"GIF89a" + encoded(PICTURE)) == Reason.UNSUPPORTED_FORMAT
    # The content of one format under the header of another reaches only the reader that the header names.
    assert refused(b"\x89PNG\r\n\x1a\n" + encoded(PICTURE, "JPEG")) in (Reason.CORRUPT, Reason.TRUNCATED)


# --- What does not


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_anywhere_is_an_error_or_the_whole_image(kind: str) -> None:
    noise = RNG.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for options in ({}, {"progressive": True} if kind == "JPEG" else {"compression": "tiff_lzw"}):
        if options and kind not in ("JPEG", "TIFF"):
            continue
        data = encoded(noise, kind, **options)
        whole = decode_image(data)
        reasons = set()
        for cut in sorted({len(data) * i // 32 for i in range(32)} | set(range(1, 40)) | set(range(-24, 0))):
            try:
                assert np.array_equal(decode_image(data[:cut]), whole), cut
            except ImageError as error:
                reasons.add(error.reason)
                assert cut < 48 or error.reason in (Reason.TRUNCATED, Reason.CORRUPT), (cut, error.reason)
        assert Reason.TRUNCATED in reasons
        assert refused(data[: len(data) // 2]) == Reason.TRUNCATED


def test_nothing_too_much_and_too_small(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert refused(empty) == Reason.EMPTY and refused(b"") == Reason.EMPTY
    data = encoded(PICTURE)
    assert refused(data, limits=ImageLimits(max_bytes=len(data) - 1)) == Reason.TOO_LARGE
    assert decode_image(data, limits=ImageLimits(max_bytes=len(data))).shape == (48, 40, 3)
    assert refused(data, limits=ImageLimits(max_pixels=48 * 40 - 1)) == Reason.TOO_MANY_PIXELS
    assert refused(data, limits=ImageLimits(max_side=47)) == Reason.TOO_MANY_PIXELS
    assert refused(data, limits=ImageLimits(min_side=41)) == Reason.TOO_SMALL
    assert decode_image(encoded(PICTURE[:1, :1])).shape == (1, 1, 3)
    big = tmp_path / "sparse.png"
    with open(big, "wb") as file:
        file.write(data)
        file.truncate(1 << 34)  # 16 GiB that occupy nothing: refused by its size, not read
    assert refused(big) == Reason.TOO_LARGE


@pytest.mark.parametrize("side", [9_000, 12_000, 50_000])
def test_declared_sizes_are_refused_before_anything_is_allocated(side: int) -> None:
    idat = zlib.compress(b"\x00" * 1000)
    chunk = struct.pack(">I", len(idat)) + b"IDAT" + idat + struct.pack(">I", zlib.crc32(b"IDAT" + idat))
    start = time.perf_counter()
    assert refused(png_header(side, side) + chunk) == Reason.TOO_MANY_PIXELS
    header = encoded(PICTURE, "BMP")
    assert refused(header[:18] + struct.pack("<ii", side, side) + header[26:]) == Reason.TOO_MANY_PIXELS
    jpeg = encoded(PICTURE, "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    assert refused(jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]) == Reason.TOO_MANY_PIXELS
    assert time.perf_counter() - start < 1.0


def test_pillows_own_guards_stay_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < 100_000_000
    # Also where the caller's own limit is wider, and where Pillow would only warn.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert refused(encoded(PICTURE)) == Reason.TOO_MANY_PIXELS


def test_gif_of_ten_thousand_frames_is_refused_unread() -> None:
    one = encoded(Image.new("P", (4, 4)), "GIF")
    start = one.index(b",")
    data = one[:start] + one[start:-1] * 10_000 + b";"
    began = time.perf_counter()
    assert refused(data) == Reason.UNSUPPORTED_FORMAT
    assert time.perf_counter() - began < 0.1


def test_animated_png_that_declares_ten_thousand_frames() -> None:
    data = encoded(PICTURE)
    body = b"acTL" + struct.pack(">II", 10_000, 0)
    chunk = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    assert refused(data[:33] + chunk + data[33:]) == Reason.TOO_MANY_FRAMES


def test_paths(tmp_path: Path) -> None:
    assert refused(tmp_path) == Reason.IS_DIRECTORY
    assert refused(tmp_path / "missing.png") == Reason.NOT_FOUND
    assert refused(tmp_path / ("x" * 5000)) == Reason.NOT_FOUND
    assert refused("a\x00b.png") == Reason.NOT_FOUND
    (tmp_path / "file").write_text("text")
    assert refused(tmp_path / "file" / "below.png") == Reason.NOT_FOUND
    assert refused(tmp_path / "file") == Reason.NOT_AN_IMAGE
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == Reason.UNREADABLE


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="the superuser may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(PICTURE))
    if os.geteuid():
        path.chmod(0)
        assert refused(path) == Reason.NO_PERMISSION
        return
    # The superuser may read everything, so another user asks.
    path.chmod(0)
    code = (
        "import os, sys; sys.path.insert(0, os.getcwd())\n"
        "from miss.engine.data import images, errors\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"try: images.decode_image({str(path)!r})\nexcept images.ImageError as e: print(e.reason)"
    )
    for folder in (path.parent, *path.parent.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == Reason.NO_PERMISSION, done.stderr


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", Reason.NOT_AN_IMAGE),
        (b"\x00" * 500, Reason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.NOT_AN_IMAGE),
        (b"%PDF-1.7 something", Reason.UNSUPPORTED_FORMAT),
        (b"8BPS\x00\x01" + b"\x00" * 30, Reason.UNSUPPORTED_FORMAT),
        (b"SIMPLE  =                    T" + b" " * 3000, Reason.UNSUPPORTED_FORMAT),
        (b"\x00\x00\x00\x1cftypavif" + b"\x00" * 30, Reason.UNSUPPORTED_FORMAT),
        (b"\x5c\x01\x00\x00" + b"\x00" * 340 + b"n+1\x00", Reason.UNSUPPORTED_FORMAT),
        (b"\x89PN", Reason.TRUNCATED),
        (b"\x89PNG\r\n\x1a\n", Reason.TRUNCATED),
        (b"\xff\xd8\xff\xe0", Reason.TRUNCATED),
        (b"II*\x00", Reason.TRUNCATED),
    ],
)
def test_other_content(data: bytes, reason: Reason) -> None:
    assert refused(data) == reason


def test_a_window_is_not_for_eight_bits() -> None:
    assert refused(encoded(PICTURE), window=(40.0, 400.0)) == Reason.BAD_OPTION
    values = np.zeros((3, 3), dtype=np.uint16)
    for window in ((0.0, 0.0), (float("nan"), 1.0), (0.0, -5.0)):
        assert refused(encoded(values), window=window) == Reason.BAD_OPTION


_SEEDS = [encoded(PICTURE, kind) for kind in FORMATS] + [encoded(GREY.astype(np.uint16) * 257, "TIFF")]


def _survives(data: bytes) -> None:
    try:
        pixels = decode_image(data, limits=ImageLimits(max_pixels=1_000_000))
    except ImageError as error:
        assert error.reason in set(Reason)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flipped_bytes_give_an_image_or_a_reason(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(_SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are where it hurts, so half of the flips go there.
        last = data.draw(st.sampled_from([len(content) - 1, min(200, len(content) - 1)]))
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    _survives(bytes(content))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", b"BM", b"", b"\x08\x00\x05\x00"]), st.binary()
)
def test_any_bytes_at_all(magic: bytes, rest: bytes) -> None:
    _survives(magic + rest)


# --- DICOM


def dicom_file(pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, **attributes: object) -> bytes:
    """A minimal DICOM file; pixels (H, W), (F, H, W) or (H, W, 3)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = Dataset()
    data.file_meta = meta
    colour = pixels.shape[-1] == 3 and pixels.ndim == 3
    data.Rows, data.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = pixels.shape[0]
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, data, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True, enforce_file_format=True
    )
    return buffer.getvalue()


CT = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)


def test_dicom_window_after_rescale_agrees_with_pydicom() -> None:
    for function, width in (("LINEAR", 400), ("LINEAR_EXACT", 400), ("SIGMOID", 400), ("LINEAR", 1)):
        data = dicom_file(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 500], WindowWidth=[width, 9],
                          VOILUTFunction=function)  # fmt: skip
        grey = decode_image(data)[:, :, 0].astype(float)
        dataset = pydicom.dcmread(io.BytesIO(data))
        theirs = apply_windowing(CT.astype(np.float64) - 1024, dataset)
        theirs = (theirs - theirs.min()) / (theirs.max() - theirs.min()) * 255
        assert np.abs(grey - theirs).max() <= 1.0, function


def test_dicom_without_a_window_takes_percentiles_and_leaves_padding_out() -> None:
    signed = (CT.astype(np.int16) - 1024).copy()
    signed[0, :] = -2000
    data = dicom_file(signed, PixelPaddingValue=-2000)
    grey = decode_image(data)[:, :, 0]
    low, high = np.percentile(signed[1:], (0.5, 99.5))
    assert np.abs(grey[1:] - np.clip((signed[1:] - low) / (high - low), 0, 1) * 255).max() <= 0.51
    assert (grey[0] == 0).all()


def test_dicom_window_argument_and_meaningless_windows() -> None:
    data = dicom_file(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    grey = decode_image(data, window=(0.0, 200.0))[:, :, 0]
    values = CT.astype(float) - 1024
    assert (grey[values <= -100] == 0).all() and (grey[values >= 100] == 255).all()
    assert refused(data, window=(0.0, 0.0)) == Reason.BAD_OPTION
    plain = decode_image(dicom_file(CT))
    assert np.array_equal(decode_image(dicom_file(CT, WindowCenter=40, WindowWidth=0)), plain)


def test_dicom_monochrome1_is_inverted() -> None:
    for extra in ({}, {"WindowCenter": 2000, "WindowWidth": 3000}):
        ordinary = decode_image(dicom_file(CT, **extra))
        inverted = decode_image(dicom_file(CT, PhotometricInterpretation="MONOCHROME1", **extra))
        assert np.array_equal(inverted, 255 - ordinary)


def test_dicom_look_up_tables() -> None:
    voi = Dataset()
    voi.LUTDescriptor, voi.LUTData = [4096, 0, 16], (65535 - np.arange(4096) * 16).astype("<u2").tobytes()
    grey = decode_image(dicom_file(CT, VOILUTSequence=[voi], WindowCenter=1, WindowWidth=1))[:, :, 0]
    assert np.abs(grey - (65535 - CT.astype(float) * 16) / 65535 * 255).max() <= 0.51
    modality = Dataset()
    modality.LUTDescriptor, modality.LUTData = [4096, 0, 16], (np.arange(4096) // 2).astype("<u2").tobytes()
    modality.ModalityLUTType = "US"
    data = dicom_file(CT, ModalityLUTSequence=[modality], WindowCenter=1000.5, WindowWidth=2001)
    assert np.abs(decode_image(data)[:, :, 0] - np.clip((CT // 2) / 2000, 0, 1) * 255).max() <= 1


def test_dicom_frames_default_to_the_middle_one() -> None:
    frames = np.stack([np.full((4, 6), 10 * i, np.uint8) for i in range(5)])
    data = dicom_file(frames, WindowCenter=128, WindowWidth=256)
    assert [int(decode_image(data, frame=i).max()) for i in range(5)] == [0, 10, 20, 30, 40]
    assert decode_image(data).max() == 20
    assert refused(data, frame=5) == Reason.NO_SUCH_FRAME
    assert refused(data, limits=ImageLimits(max_frames=4)) == Reason.TOO_MANY_FRAMES


def test_dicom_enhanced_files_keep_rescale_and_window_by_frame() -> None:
    groups = []
    for centre in (500, 3000):
        rescale, window, group = Dataset(), Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, 0
        window.WindowCenter, window.WindowWidth = centre, 100
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [rescale], [window]
        groups.append(group)
    data = dicom_file(np.stack([CT, CT]), PerFrameFunctionalGroupsSequence=groups)
    assert (decode_image(data, frame=0)[:, :, 0] == 255).mean() > (decode_image(data, frame=1)[:, :, 0] == 255).mean()


def test_dicom_colour_and_depths() -> None:
    assert np.array_equal(decode_image(dicom_file(PICTURE)), PICTURE)
    wide = PICTURE.astype(np.uint16) * 257
    assert np.array_equal(decode_image(dicom_file(wide)), PICTURE)
    float_pixels = dicom_file(CT, WindowCenter=2048, WindowWidth=4096)
    dataset = pydicom.dcmread(io.BytesIO(float_pixels))
    del dataset.PixelData
    dataset.FloatPixelData, dataset.BitsAllocated = CT.astype(np.float32).tobytes(), 32
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    assert np.abs(decode_image(buffer.getvalue()).astype(int) - decode_image(float_pixels)).max() <= 1


def test_dicom_size_is_checked_before_decoding() -> None:
    data = dicom_file(CT, Rows=60_000, Columns=60_000)
    assert refused(data) == Reason.TOO_MANY_PIXELS
    assert refused(dicom_file(CT, Rows=40)) == Reason.TRUNCATED
    assert refused(dicom_file(CT, NumberOfFrames=3)) == Reason.TRUNCATED


def test_dicom_that_inflates_without_end_is_refused() -> None:
    plain = dicom_file(np.zeros((2000, 2000), np.uint8))
    end = 144 + int.from_bytes(plain[140:144], "little")
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflater.compress(plain[end:]) + deflater.flush()
    meta = pydicom.dcmread(io.BytesIO(plain)).file_meta
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    buffer = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(buffer, meta)
    data = b"\x00" * 128 + b"DICM" + buffer.getvalue() + body
    assert decode_image(data).shape == (2000, 2000, 3)
    assert len(data) < 20_000
    assert refused(data, limits=ImageLimits(max_bytes=1_000_000)) == Reason.TOO_LARGE
    assert refused(data[:-200]) == Reason.TRUNCATED
    twice = buffer.getvalue() + buffer.getvalue()
    assert refused(b"\x00" * 128 + b"DICM" + twice + body) == Reason.CORRUPT


def dicom_examples() -> list[str]:
    root = Path(pydicom.__file__).parent / "data"
    found = [p for p in glob.glob(f"{root}/**/*", recursive=True) if os.path.isfile(p)]
    return sorted(p for p in found if not p.endswith((".py", ".pyc", ".json", ".txt", ".md", ".xml")))


def test_pydicoms_real_files_decode_or_say_why() -> None:
    reasons: dict[str, int] = {}
    for path in dicom_examples():
        try:
            pixels = decode_image(path)
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
            reasons["decoded"] = reasons.get("decoded", 0) + 1
        except ImageError as error:
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
    assert reasons["decoded"] >= 85, reasons
    assert set(reasons) - {"decoded"} <= {
        Reason.NOT_AN_IMAGE, Reason.UNSUPPORTED_FORMAT, Reason.TRUNCATED, Reason.CORRUPT, Reason.MISSING_DECODER
    }, reasons  # fmt: skip


@pytest.mark.parametrize(
    "name", ["MR_small.dcm", "MR_small_RLE.dcm", "SC_rgb_jpeg_dcmd.dcm", "MR_small_jp2klossless.dcm",
             "MR_small_jpeg_ls_lossless.dcm", "examples_palette.dcm", "image_dfl.dcm"],
)  # fmt: skip
def test_dicom_truncated_anywhere_is_an_error_or_the_whole_image(name: str) -> None:
    data = Path(next(p for p in dicom_examples() if p.endswith("/" + name))).read_bytes()
    try:
        whole = decode_image(data)
    except ImageError as error:
        assert error.reason == Reason.MISSING_DECODER
        pytest.skip(f"no decoder installed for {name}")
    for i in [*range(1, 32), *range(-20, 0)]:
        try:
            assert np.array_equal(decode_image(data[: len(data) * i // 32 if i > 0 else i]), whole), i
        except ImageError as error:
            assert error.reason in (Reason.TRUNCATED, Reason.CORRUPT, Reason.NOT_AN_IMAGE), (i, error)


def test_one_slice_in_five_encodings_is_one_image() -> None:
    """The same MR slice: implicit, explicit, big-endian, padded, RLE, JPEG-LS and JPEG 2000, all without loss."""
    names = ["implicit", "expb", "bigendian", "padded", "RLE", "jp2klossless", "jpeg_ls_lossless"]
    paths = {p.rsplit("MR_small_", 1)[1][:-4]: p for p in dicom_examples() if "/MR_small_" in p}
    plain = decode_image(next(p for p in dicom_examples() if p.endswith("/MR_small.dcm")))
    for name in names:
        try:
            assert np.array_equal(decode_image(paths[name]), plain), name
        except ImageError as error:
            assert error.reason == Reason.MISSING_DECODER, name


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(p for p in dicom_examples() if p.endswith("/MR_small_jpeg_ls_lossless.dcm"))
    monkeypatch.setattr(dicom, "PLUGINS", {**dicom.PLUGINS, "1.2.840.10008.1.2.4.80": ("gdcm-of-nowhere",)})
    monkeypatch.setitem(dicom.PACKAGES, "gdcm-of-nowhere", "pyjpegls")
    with pytest.raises(ImageError, match=r"miss-engine\[dicom\]") as caught:
        decode_image(path)
    assert caught.value.reason == Reason.MISSING_DECODER and "pyjpegls" in str(caught.value)


def test_gpl_and_panicking_decoders_are_never_chosen() -> None:
    """pydicom's plugin `pylibjpeg` means pylibjpeg-libjpeg (GPL-3.0) for JPEG and JPEG-LS.

    For RLE it means pylibjpeg-rle, which panics on damaged data (a BaseException, with a trace on standard error).
    """
    assert dicom.PLUGINS["1.2.840.10008.1.2.5"] == ("pydicom",)
    for syntax, plugins in dicom.PLUGINS.items():
        if syntax.split(".")[-1] in ("50", "51", "57", "70", "80", "81"):
            assert "pylibjpeg" not in plugins


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flipped_bytes_of_dicom_files(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(_dicom_seeds())))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(128, len(content) - 1))] = data.draw(st.integers(0, 255))
    _survives(bytes(content))


def _dicom_seeds() -> list[bytes]:
    wanted = ("MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_small_odd_jpeg.dcm", "JPEGLSNearLossless_16.dcm")
    files = [Path(p).read_bytes() for p in dicom_examples() if p.endswith(wanted)]
    return [*files, dicom_file(CT, WindowCenter=40, WindowWidth=400), dicom_file(PICTURE)]
