"""DICOM through pydicom, from stored values to what a viewer would show, as RGB pixels.

Knows DICOM's pixel description and which permissively licensed decoders are installed; does not know files on disk,
patients (no identifying field is read) or other formats.

The order of PS3.3 C.11: stored values, modality LUT or rescale, VOI LUT or window, presentation (MONOCHROME1 inverted).
"""

import io
import warnings
import zlib
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.pixels.processing import apply_voi
from pydicom.uid import UID

from miss.engine.data.errors import ImageError, ImageLimits, Reason, check_frame, is_our_mistake
from miss.engine.data.raster import grey_to_rgb, stretch, window_range

# What pydicom finds odd about a file that decodes is no message for the one who asks a question about the image.
warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom(\.|$)")

Dataset = Any

DEFLATED = b"1.2.840.10008.1.2.1.99"
EXPLICIT_LITTLE = b"1.2.840.10008.1.2.1\x00\x00\x00"  # as long as the one it replaces
MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
PERCENTILES = (0.5, 99.5)

# Which of pydicom's decoding plugins may run, best first: permissive licences alone. pydicom's own order would take
# pylibjpeg for the JPEG family, which there is pylibjpeg-libjpeg under the GPL (for JPEG 2000 it is not). RLE is
# pydicom's own: pylibjpeg-rle panics on damaged data, past every `except Exception`.
_JPEG, _LOSSLESS, _JPEGLS = ("pillow", "gdcm"), ("gdcm",), ("pyjpegls", "gdcm")
_JPEG2000, _HTJ2K, _RLE = ("pylibjpeg", "pillow", "gdcm"), ("pylibjpeg",), ("pydicom",)
PLUGINS = {
    "1.2.840.10008.1.2.4.50": _JPEG,
    "1.2.840.10008.1.2.4.51": _JPEG,
    "1.2.840.10008.1.2.4.57": _LOSSLESS,
    "1.2.840.10008.1.2.4.70": _LOSSLESS,
    "1.2.840.10008.1.2.4.80": _JPEGLS,
    "1.2.840.10008.1.2.4.81": _JPEGLS,
    "1.2.840.10008.1.2.4.90": _JPEG2000,
    "1.2.840.10008.1.2.4.91": _JPEG2000,
    "1.2.840.10008.1.2.4.201": _HTJ2K,
    "1.2.840.10008.1.2.4.202": _HTJ2K,
    "1.2.840.10008.1.2.4.203": _HTJ2K,
    "1.2.840.10008.1.2.5": _RLE,
}
RLE = ("1.2.840.10008.1.2.5",)
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
PACKAGES = {"pyjpegls": "pyjpegls", "pylibjpeg": "pylibjpeg and pylibjpeg-openjpeg", "gdcm": "python-gdcm"}
PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


def decode_dicom(data: bytes, frame: int | None, window: tuple[float, float] | None, limits: ImageLimits) -> np.ndarray:
    """One frame of a DICOM file, uint8 (H, W, 3); without `frame` the middle one.

    Raises:
        ImageError: it holds no image, is truncated or corrupt, is outside the limits, or needs a decoder that is not
            installed.
    """
    if window is not None:
        window_range(window)  # a wrong window is the caller's error, whatever the file
    try:
        dataset = pydicom.dcmread(io.BytesIO(_inflated(data, limits)), force=data[128:132] != b"DICM")
        index = _check(dataset, frame, limits)
        plugin = _choose_plugin(dataset, index)
        stored, photometric = _decode(dataset, index, plugin)
        return _display(dataset, stored, photometric, index, window)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError(Reason.TOO_LARGE, "the image needs more memory than there is; scale it down first") from None
    except EOFError:
        raise _truncated() from None
    except Exception as error:  # pydicom and its decoders raise most of Python's exceptions for broken files
        if is_our_mistake(error):
            raise
        raise _corrupt() from None


def dicom_header(data: bytes, limits: ImageLimits) -> tuple[int, int, int, int, bool, tuple[float, float] | None]:
    """Columns, rows, frames, the middle one, whether a window may be given, and the file's own for that frame.

    Raises:
        ImageError: as `decode_dicom`, as far as the header shows it.
    """
    try:
        dataset = pydicom.dcmread(io.BytesIO(_inflated(data, limits)), force=data[128:132] != b"DICM")
        index = _check(dataset, None, limits)
        grey = str(dataset.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
        voi = _functional(dataset, index, "FrameVOILUTSequence", "WindowCenter")
        own = None
        if grey and "VOILUTSequence" not in voi and "WindowCenter" in voi and "WindowWidth" in voi:
            own = _first(voi.WindowCenter), _first(voi.WindowWidth)
        known = own is not None and all(value is not None and np.isfinite(value) for value in own)
        num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
        window = own if known else None
        return int(dataset.Columns), int(dataset.Rows), num_frames, index, grey, window  # type: ignore[return-value]
    except ImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # as above
        if is_our_mistake(error):
            raise
        raise _corrupt() from None


def says_burned_in(data: bytes, limits: ImageLimits) -> bool:
    """Whether a DICOM file that decodes declares text in its pixels, BurnedInAnnotation (0028,0301) YES. Of a file that
    does not say, nothing is known: pixels are not read for text."""
    file, force = io.BytesIO(_inflated(data, limits)), data[128:132] != b"DICM"
    try:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, force=force, specific_tags=["BurnedInAnnotation"])
        return str(dataset.get("BurnedInAnnotation") or "").strip().upper() == "YES"
    except MemoryError:
        raise
    except Exception as error:  # an element that cannot be read says nothing
        if is_our_mistake(error):
            raise
        return False


def _inflated(data: bytes, limits: ImageLimits) -> bytes:
    """A deflated file as a plain one, its size bounded; any other as it is. pydicom alone would inflate without end."""
    if DEFLATED not in data:
        return data
    # (0002,0000) UL says where the file's meta information, which is never deflated, ends.
    end = 144 + int.from_bytes(data[140:144], "little")
    if data[128:138] != b"DICM\x02\x00\x00\x00UL" or DEFLATED not in data[:end]:
        return _without_second(data, data)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[end:], limits.max_bytes + 1)
    if len(body) <= limits.max_bytes and not inflater.eof:
        raise _truncated()
    limits.check_bytes(len(body))
    return _without_second(data[:end].replace(DEFLATED, EXPLICIT_LITTLE, 1) + body, data)


def _without_second(plain: bytes, data: bytes) -> bytes:
    # A second mention could make pydicom inflate after all.
    if DEFLATED in plain:
        raise _corrupt()
    assert plain is not data
    return plain


def _check(dataset: Dataset, frame: int | None, limits: ImageLimits) -> int:
    """The index of the frame to decode, once all that the header declares is within the limits."""
    meta = getattr(dataset, "file_meta", None)
    if meta is not None and meta.get("MediaStorageSOPClassUID") == MEDIA_DIRECTORY:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, "the file is a DICOMDIR index; give one DICOM image of it")
    if not any(keyword in dataset for keyword in PIXEL_KEYWORDS):
        if "Rows" in dataset and "Columns" in dataset:
            raise _truncated()
        raise ImageError(
            Reason.NOT_AN_IMAGE, "the DICOM file holds no pixels (a report, a plan or damaged); give one with an image"
        )
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    limits.check_size(columns, rows)
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    limits.check_frames(num_frames)
    samples, bits = int(dataset.get("SamplesPerPixel", 1)), int(dataset.get("BitsAllocated", 16))
    if samples not in (1, 3, 4) or bits not in (1, 8, 16, 32, 64) or num_frames < 1:
        raise _corrupt()
    return check_frame(num_frames // 2 if frame is None else frame, num_frames)


def _choose_plugin(dataset: Dataset, index: int) -> str:
    """The decoder for a transfer syntax ("" where none is needed).

    Raises:
        ImageError: the syntax is unknown, or nothing that may decode it is installed.
    """
    syntax = _syntax(dataset)
    if syntax in NATIVE:
        return ""
    allowed = PLUGINS.get(syntax)
    if allowed is None:
        raise ImageError(
            Reason.UNSUPPORTED_FORMAT,
            f"the DICOM transfer syntax {UID(syntax).name[:80]} is not decoded here; accepted: uncompressed, deflated, "
            f"RLE, JPEG, JPEG-LS, JPEG 2000; convert the file to one of these",
        )
    if allowed == _JPEG and stream_info(_stream(dataset, index)).bits > 8:
        raise ImageError(
            Reason.UNSUPPORTED_FORMAT,
            "the DICOM file is compressed as 12-bit lossy JPEG, for which there is no decoder of a permissive licence; "
            "convert it to uncompressed DICOM or to JPEG 2000",
        )
    for plugin in allowed:
        if plugin in get_decoder(UID(syntax)).available_plugins:
            return plugin
    wanted = PACKAGES[allowed[0]]
    extra = "pip install 'miss-engine[dicom]'" if allowed != _LOSSLESS else f"pip install {wanted}"
    raise ImageError(
        Reason.MISSING_DECODER,
        f"the DICOM file is compressed as {UID(syntax).name}, whose decoder ({wanted}) is not installed: {extra}, or "
        f"convert the file to uncompressed DICOM",
    )


def _syntax(dataset: Dataset) -> str:
    meta = getattr(dataset, "file_meta", None)
    found = meta.get("TransferSyntaxUID") if meta is not None else None
    if found:
        return str(found)
    implicit, little = dataset.original_encoding
    return NATIVE[2] if little is False else NATIVE[0] if implicit else NATIVE[1]


def _decode(dataset: Dataset, index: int, plugin: str) -> tuple[np.ndarray, str]:
    """Stored values of one frame, (H, W) or (H, W, samples), and their photometric interpretation."""
    syntax = UID(_syntax(dataset))
    if not getattr(dataset, "file_meta", None):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    if plugin:
        _check_stream(dataset, index)
    else:
        _check_length(dataset)
    values, described = get_decoder(syntax).as_array(dataset, index=index, decoding_plugin=plugin)
    return values, str(described.get("photometric_interpretation", dataset.get("PhotometricInterpretation", "")))


def _check_length(dataset: Dataset) -> None:
    """Uncompressed values must all be there: pydicom would fill or refuse in words of its own."""
    keyword = next(k for k in PIXEL_KEYWORDS if k in dataset)
    bits = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword, int(dataset.get("BitsAllocated", 16)))
    samples = int(dataset.get("SamplesPerPixel", 1))
    num_values = int(dataset.Rows) * int(dataset.Columns) * samples * int(dataset.get("NumberOfFrames", 1) or 1)
    if dataset.get("PhotometricInterpretation") in ("YBR_FULL_422", "YBR_PARTIAL_422"):
        num_values = num_values // 3 * 2
    if len(dataset[keyword].value or b"") < (num_values * bits + 7) // 8:
        raise _truncated()


def _check_stream(dataset: Dataset, index: int) -> None:
    """A compressed frame must be as large as the file says: its decoder allocates what the stream declares."""
    if _syntax(dataset) in RLE:
        return
    info = stream_info(_stream(dataset, index))
    if info[:3] != (int(dataset.Columns), int(dataset.Rows), int(dataset.get("SamplesPerPixel", 1))):
        raise _corrupt()


def _stream(dataset: Dataset, index: int) -> bytes:
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    return get_frame(dataset.PixelData, index, number_of_frames=num_frames)


class StreamInfo(NamedTuple):
    """What a compressed stream declares."""

    width: int
    height: int
    components: int
    bits: int


def stream_info(stream: bytes) -> StreamInfo:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream.

    Raises:
        ImageError: it is neither, or has no header.
    """
    start = stream.find(b"\xff\x4f\xff\x51")
    if 0 <= start < 4096:
        fields = [int.from_bytes(stream[start + 8 + 4 * i : start + 12 + 4 * i], "big") for i in range(4)]
        components, bits = int.from_bytes(stream[start + 40 : start + 42], "big"), (stream[start + 42] & 0x7F) + 1
        return StreamInfo(fields[0] - fields[2], fields[1] - fields[3], components, bits)
    at = 2 if stream[:2] == b"\xff\xd8" else len(stream)
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            height, width = (int.from_bytes(stream[at + i : at + i + 2], "big") for i in (5, 7))
            return StreamInfo(width, height, stream[at + 9], stream[at + 4])
        at += 2 + length
    raise _corrupt()


def _display(
    dataset: Dataset, stored: np.ndarray, photometric: str, index: int, window: tuple[float, float] | None
) -> np.ndarray:
    if photometric == "PALETTE COLOR":
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
        return _colour(apply_color_lut(stored, dataset), bits)
    if stored.ndim == 3:
        return _colour(stored[:, :, :3], int(dataset.get("BitsStored", 8)))
    return grey_to_rgb(_grey(dataset, stored, photometric, index, window))


def _colour(values: np.ndarray, bits: int) -> np.ndarray:
    """Colour of any depth as uint8, by the range that its depth has."""
    if values.dtype == np.uint8 and (bits >= 8 or int(values.max(initial=0)) >= 1 << bits):
        return np.ascontiguousarray(values)
    return stretch(values.astype(np.float32), 0.0, float((1 << bits) - 1))


def _grey(
    dataset: Dataset, stored: np.ndarray, photometric: str, index: int, window: tuple[float, float] | None
) -> np.ndarray:
    """What a viewer shows of stored values (H, W), uint8."""
    rescale = _functional(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
    values = np.asarray(apply_modality_lut(stored, rescale))
    voi = _functional(dataset, index, "FrameVOILUTSequence", "WindowCenter")
    grey = None
    if window is not None:
        grey = stretch(values.astype(np.float64), *window_range(window))
    elif "VOILUTSequence" in voi:
        table = voi.VOILUTSequence[0]
        shown = apply_voi(np.rint(values).astype(np.int64), voi)
        grey = stretch(shown.astype(np.float64), 0.0, float((1 << int(table.LUTDescriptor[2])) - 1))
    elif "WindowCenter" in voi and "WindowWidth" in voi:
        grey = _windowed(values.astype(np.float64), voi)
    if grey is None:
        grey = _by_percentile(values.astype(np.float64), ~_padding(dataset, stored))
    return 255 - grey if photometric == "MONOCHROME1" else grey


def _functional(dataset: Dataset, index: int, sequence: str, keyword: str) -> Dataset:
    """Where a frame's attribute stands: the file itself, or an enhanced file's groups for this frame or for all."""
    if keyword in dataset:
        return dataset
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*frames[index : index + 1], *(dataset.get("SharedFunctionalGroupsSequence") or [])]:
        items = group.get(sequence)
        if items:
            return items[0]
    return dataset


def _windowed(values: np.ndarray, voi: Dataset) -> np.ndarray | None:
    """By the first of the file's windows (PS3.3 C.11.2.1.2 and C.11.2.1.3); None where that one means nothing."""
    centre, width = _first(voi.WindowCenter), _first(voi.WindowWidth)
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if centre is None or width is None or not (np.isfinite(centre) and np.isfinite(width)):
        return None
    if function == "LINEAR" and width >= 1:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
        return stretch(values, low, high) if width > 1 else np.where(values > low, 255, 0).astype(np.uint8)
    if function == "LINEAR_EXACT" and width > 0:
        return stretch(values, centre - width / 2, centre + width / 2)
    if function == "SIGMOID" and width > 0:
        exponent = np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)
        return np.rint(255.0 / (1.0 + np.exp(exponent))).astype(np.uint8)
    return None


def _first(value: Any) -> float | None:
    if isinstance(value, pydicom.multival.MultiValue | list | tuple):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)


def _padding(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Which stored values are no part of the picture (PixelPaddingValue, or its range)."""
    first, last = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return np.zeros(stored.shape, dtype=bool)
    last = last if isinstance(last, int) else first
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _by_percentile(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """The 0.5 and 99.5 percentiles become black and white; where both are one value, the extremes do."""
    inside = values[picture & np.isfinite(values)]
    if not inside.size:
        inside = values[np.isfinite(values)]
    if not inside.size:
        raise ImageError(Reason.CORRUPT, "the image holds no finite value; export it again")
    low, high = np.percentile(inside, PERCENTILES)
    if not high > low:
        low, high = inside.min(), inside.max()
    return stretch(np.nan_to_num(values, nan=low, posinf=high, neginf=low), float(low), float(high))


def _truncated() -> ImageError:
    return ImageError(Reason.TRUNCATED, "the DICOM file ends before its pixels do; give the whole file")


def _corrupt() -> ImageError:
    return ImageError(Reason.CORRUPT, "the file begins as DICOM but cannot be decoded; export it again")
