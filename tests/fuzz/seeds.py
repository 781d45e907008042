"""`python -m tests.fuzz.seeds`: writes the kept corpus anew, by our own generators alone.

Knows small examples of each target's input, whole and broken; does not know what comes of them.
"""

import json
import shutil
from collections.abc import Iterator

from safetensors.numpy import save

from miss.engine.training.checkpoint import _manifest_bytes
from miss.models.config import MissConfig
from miss.models.weights import config_files
from tests.engine.serving.broken import dicom, flipped, giants, np, picture, png_that_declares, whole
from tests.engine.serving.harness import chat, data_url
from tests.fuzz.harness import CORPUS

Seeds = Iterator[tuple[str, bytes]]
DEEP = 1500


def image() -> Seeds:
    for name, data in [*whole(), *giants()]:
        if len(data) < 6000 and not name.startswith("exif-") or name == "exif-6":
            yield name, b"\1" + data
    yield "page-1", b"\x10" + picture(kind="TIFF", size=(8, 8))
    yield "window", b"\x83" + picture("I;16", (8, 8))
    yield "bomb", b"\1" + png_that_declares(900, 900, b"\0" * (900 * 2701))


def of_dicom() -> Seeds:
    random = np.random.default_rng(3)
    for bits in (8, 16, 32):
        yield f"bits-{bits}", b"\0" + dicom("name", bits, (8, 8))
    yield "no-preamble", b"\4" + dicom("name", 8, (8, 8))[132:]
    yield "window", b"\x22" + dicom("name", 16, (8, 8), WindowCenter=100, WindowWidth=50, RescaleSlope=2)
    yield "frames", b"\x11" + dicom("name", 8, (8, 8), NumberOfFrames=2, PixelData=bytes(128))
    yield "inverted", b"\0" + dicom("name", 8, (8, 8), PhotometricInterpretation="MONOCHROME1")
    yield (
        "colour",
        b"\0"
        + dicom(
            "n",
            8,
            (8, 8),
            SamplesPerPixel=3,
            PlanarConfiguration=0,
            PhotometricInterpretation="RGB",
            PixelData=bytes(192),
        ),
    )
    yield "padding", b"\0" + dicom("name", 16, (8, 8), PixelPaddingValue=0)
    yield "rle", b"\0" + dicom("name", 8, (8, 8)).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    yield "deflated", b"\0" + dicom("name", 8, (8, 8)).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20])
    for number in range(8):
        yield f"flip-{number}", b"\0" + flipped(dicom("name", 8, (8, 8)), random, 3, 1 << 20)


def manifest() -> Seeds:
    row = {"qid": "1", "image": "a.png", "question": "is it?", "answer": "no", "answer_type": "closed"}
    yield "questions", b"\0" + json.dumps(row).encode() + b"\n" + json.dumps({**row, "qid": 2}).encode()
    yield "questions-leaving", b"\0" + json.dumps({**row, "image": "../../etc/passwd"}).encode()
    yield "questions-long", b"\0" + json.dumps({**row, "image": "a" * 300}).encode()
    yield "questions-far", b"\0" + json.dumps({**row, "image": "a/" * 3000}).encode()
    yield "questions-deep", b"\0" + b"[" * DEEP
    yield "pairs", b"\1" + json.dumps({"image": "a.png", "captions": ["a chest", "an x-ray"]}).encode()
    yield "pair", b"\1" + json.dumps({"image": "a.png", "caption": "a chest"}).encode()
    yield "csv", b'\2image,caption\na.png,"a ""chest"""\n../a,b\n'
    shard = {"name": "a.tar", "bytes": 1024, "sha256": "0"}
    index = {"format": "miss-packed", "version": 1, "shards": [shard], "images": [["a", 0, 0, 10, 1]]}
    yield "packed", b"\3" + json.dumps(index).encode()
    yield "packed-long", b"\3" + json.dumps({**index, "shards": [{**shard, "name": "a" * 300 + ".tar"}]}).encode()
    yield "packed-deep", b"\3" + b'{"a":' * DEEP
    listed = {"state": {"size": 2, "sha256": "6b51d431df5d7f141cbececcf79edf3dd861c3b4069f0b11661a3eefacbba918"}}
    yield "files", b"\4" + _manifest_bytes(listed)
    yield "files-deep", b"\4" + b"[" * DEEP
    for number, wrong in enumerate(({"state": 1}, {"state": None}, ["state"], "state", {"state": {}}, 7)):
        yield f"sealed-{number}", b"\5" + json.dumps(wrong).encode()
    yield "sealed", b"\5" + json.dumps(listed).encode()


def request() -> Seeds:
    body = chat("tiny", "is there a mass?", picture(size=(4, 4)), n=2, temperature=0.5, seed=3, stream=True)
    yield "chat", b"\0" + json.dumps(body).encode()
    yield "chat-candidates", b"\0" + json.dumps({**body, "candidates": ["yes", "no"]}).encode()
    yield "chat-deep", b"\0" + b'{"messages":' * DEEP
    asked = {"image": data_url(picture(size=(4, 4))).partition(",")[2], "questions": ["ct", "x ray"], "num_beams": 3}
    yield "vqa", b"\1" + json.dumps(asked).encode()
    yield "vqa-numbers", b"\1" + json.dumps({**asked, "top_k": 2**70, "window": [1e308, -1e308]}).encode()
    yield "vqa-surrogate", b"\1" + json.dumps({**asked, "constrain": ["\ud800"]}).encode()
    part = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    fields = [
        (b"question", b"ct"),
        (b"window", b"1"),
        (b"window", b"nan"),
        (b"top_k", b"1e400"),
        (b"seed", b"9" * 5000),
    ]
    file = part % (b"image", b'; filename="a.png"\r\nContent-Type: image/png', picture(size=(4, 4)))
    for number in range(len(fields)):
        yield f"form-{number}", b"\2" + b"".join(part % (n, b"", v) for n, v in fields[: number + 1]) + file + b"--x--"
    yield "form-cut", b"\2" + file[:60]


def checkpoint() -> Seeds:
    whole_file = save({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.uint8)}, {"sha256": "0", "files": "{}"})
    yield "tensors", b"\0" + whole_file
    length = int.from_bytes(whole_file[:8], "little")
    yield "header", b"\1" + whole_file[8 : 8 + length] + b"\n" + whole_file[8 + length :]
    for name, shape, size in (("huge", [2**40, 2**40], 0), ("none", [0, 2**62], 0), ("none-large", [0, 2**64 - 1], 0)):
        told = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        yield name, b"\1" + json.dumps(told).encode() + b"\n"
    odd = {"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}
    yield "odd-type", b"\1" + json.dumps(odd).encode() + b"\n1"
    deep = {"__metadata__": {"files": "[" * DEEP}}
    yield "seals-deep", b"\1" + json.dumps(deep).encode() + b"\n"
    for number, seals in enumerate(("[]", "7", '{"config.json": 1}', '{"../x": "0"}', '{"%s": "0"}' % ("a" * 300))):
        yield f"seals-{number}", b"\1" + json.dumps({"__metadata__": {"files": seals}}).encode() + b"\n"
    yield "long-header", b"\0" + (2**63).to_bytes(8, "little")
    files = config_files(MissConfig.preset("small"))
    yield "config", b"\2" + files["config.json"]
    yield "config-deep", b"\2" + b'{"a":' * DEEP
    yield "config-not-text", b"\2\xff\xfe{"
    yield "preprocessor", b"\3" + files["preprocessor_config.json"]


TARGETS = {"image": image, "dicom": of_dicom, "manifest": manifest, "request": request, "checkpoint": checkpoint}


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    for target, seeds in TARGETS.items():
        (CORPUS / target).mkdir(parents=True)
        for name, data in seeds():
            (CORPUS / target / name).write_bytes(data)


if __name__ == "__main__":
    main()
