"""Packing: the same samples come back, images within the stated loss, nothing half-written."""

import gzip
import hashlib
import json
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miss.engine.data.datasets import DataError, Sample, load_dataset
from miss.engine.data.images import ImageError, Reason, decode_image
from miss.engine.data.pack import PackedImage, PackOptions, pack, read_packed, shrink, verify_shards
from miss.engine.data.pack_pairs import pack_pairs
from miss.engine.data.pairs import Pair, load_pairs
from miss.engine.data.processor import Processor
from tests.engine.test_check import sample, scene
from tests.engine.test_pairs import write_pairs
from tests.helpers import data_root

ROOT = Path(__file__).resolve().parents[2]


def two_sets(folder: Path) -> dict[tuple[str, str], list[Sample]]:
    shapes = [(300, 200), (64, 300), (50, 40), (256, 256), (400, 400)]
    made = []
    for i, shape in enumerate(shapes):
        dataset = "slake" if i < 3 else "vqa-rad"
        made.append(sample(folder, f"{i}/picture {i}.png", scene(i).resize(shape), dataset))
    chinese = sample(folder, "0/picture 0.png", scene(0).resize(shapes[0]), "slake", qid="zh", language="zh")
    marked = sample(folder, "4/picture 4.png", scene(4).resize(shapes[4]), "vqa-rad", qid="m", also_in=("slake",),
                    answer_type=None, organ="head", question="ä — 画像?")  # fmt: skip
    return {("slake", "train"): [*made[:2], chinese], ("slake", "validate"): [made[2]],
            ("vqa-rad", "train"): [made[3]], ("vqa-rad", "test"): [made[4], marked]}  # fmt: skip


def bare(samples: list[Sample]) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(s).items() if k != "image"} for s in samples]


@pytest.mark.parametrize("lossless", [False, True])
def test_the_same_samples_come_back(tmp_path: Path, processor: Processor, lossless: bool) -> None:
    splits = two_sets(tmp_path / "in")
    options = PackOptions(image_size=64, lossless=lossless)
    report = pack(splits, tmp_path / "out", options, shard_bytes=3000)
    assert (report.num_samples, report.num_images) == (7, 5) and report.num_shards >= 2
    assert report.num_bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    everything = [s for rows in splits.values() for s in rows]
    assert bare(read_packed(tmp_path / "out", None, "train", "all")) == bare(
        [*splits["slake", "train"], *splits["vqa-rad", "train"]]
    )
    by_key = {}
    for split in ("train", "validate", "test"):
        by_key |= {s.image_key: s for s in read_packed(tmp_path / "out", None, split, "all")}
    assert len(by_key) == 5
    for original in everything:
        packed = decode_image(by_key[original.image_key].image)
        small = shrink(decode_image(original.image), options)
        assert packed.shape == small.shape and max(packed.shape) <= 64
        if lossless:
            assert np.array_equal(packed, small)
        else:
            assert np.abs(packed.astype(int) - small).mean() < 6.0  # these pictures are all colour, which WebP halves
    assert verify_shards(tmp_path / "out") == []


def test_a_lossless_pack_gives_the_model_the_same_pixels(tmp_path: Path, processor: Processor) -> None:
    """The processor stretches each side for itself, so shrinking each to the model's size first changes nothing."""
    splits = two_sets(tmp_path / "in")
    pack(splits, tmp_path / "out", PackOptions(28, processor.preprocess.resample, lossless=True))
    packed = {s.image_key: s for s in read_packed(tmp_path / "out", None, "all", "all")}
    for rows in splits.values():
        for s in rows:
            if s.image_key in packed:
                expected = processor.image(decode_image(s.image))
                assert np.array_equal(processor.image(decode_image(packed[s.image_key].image)), expected), s.qid


def test_every_name_reads_its_part(tmp_path: Path) -> None:
    splits = two_sets(tmp_path / "in")
    out = tmp_path / "out"
    pack(splits, out, PackOptions(32))
    assert bare(load_dataset("slake", out, "train")) == bare(splits["slake", "train"][:2])
    assert [s.qid for s in load_dataset("slake", out, "train", "zh")] == ["zh"]
    assert bare(load_dataset("vqa-rad", out, "test")) == bare(splits["vqa-rad", "test"])
    assert len(load_dataset("packed", out, "all", "all")) == 5 and len(load_dataset("packed", out, "all")) == 4
    with pytest.raises(DataError, match="no test split of slake was packed; there are: slake train"):
        load_dataset("slake", out, "test")
    with pytest.raises(DataError, match="vqa-med-2019"):
        load_dataset("vqa-med-2019", out, "train")
    with pytest.raises(DataError, match="index.json"):
        load_dataset("packed", tmp_path / "in", "train")


def test_packing_twice_gives_the_same_bytes_and_replaces_an_older_pack(tmp_path: Path) -> None:
    splits = two_sets(tmp_path / "in")
    pack(splits, tmp_path / "a", PackOptions(64), shard_bytes=2000)
    pack(splits, tmp_path / "b", PackOptions(64), shard_bytes=2000)
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert len(names) > 3
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    pack(splits, tmp_path / "b", PackOptions(32))
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["index.json", "samples.jsonl.gz", "shard-00000.tar"]
    assert len(load_dataset("packed", tmp_path / "b", "all")) == 4
    # A pack can be packed again.
    again = {k: read_packed(tmp_path / "b", k[0], k[1], "all") for k in splits}
    pack(again, tmp_path / "c", PackOptions(32))
    assert bare(load_dataset("packed", tmp_path / "c", "all")) == bare(load_dataset("packed", tmp_path / "b", "all"))


def test_shards_are_plain_tar(tmp_path: Path) -> None:
    pack(two_sets(tmp_path / "in"), tmp_path / "out", PackOptions(32))
    with tarfile.open(tmp_path / "out" / "shard-00000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [f"{i:08d}.webp" for i in range(5)]
        data = tar.extractfile(members[2]).read()  # type: ignore[union-attr]
    (packed,) = load_dataset("slake", tmp_path / "out", "validate")
    assert packed.image.read_bytes() == data


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        pack(two_sets(tmp_path / "in"), tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    splits = two_sets(tmp_path / "in")
    path = splits["vqa-rad", "train"][0].image
    path.write_bytes(path.read_bytes()[:200])  # type: ignore[union-attr]
    with pytest.raises(ImageError, match="vqa-rad/3/picture 3.png: the PNG file ends early") as caught:
        pack(splits, tmp_path / "out")
    assert caught.value.reason == Reason.TRUNCATED
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("options", [{"image_size": 0}, {"resample": "nearest"}, {"quality": 101}])
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="wanted|accepted"):
        PackOptions(**options)


# --- Damaged and hostile folders


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def set_at(*path: Any) -> Any:
    *where, last, value = path

    def change(index: Any) -> None:
        for step in where:
            index = index[step]
        index[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("format", "zip"), "not the index"),
        (set_at("version", 2), "version 2"),
        (set_at("shards", 0, "name", "../secret.tar"), "plain file names"),
        (set_at("shards", 0, "name", "/etc/passwd"), "plain file names"),
        (set_at("shards", 0, "name", "gone.tar"), "no such file"),
        (set_at("shards", 0, "name", 7), "plain file names"),
        (set_at("shards", 0, "bytes", 10), "wanted 10"),
        (set_at("shards", None), "damaged"),
        (set_at("images", 0, 2, 1 << 40), "outside"),
        (set_at("images", 0, 2, -5), "outside"),
        (set_at("images", 0, 1, 9), "damaged"),
        (set_at("images", 0, ["key"]), "damaged"),
        (set_at("images", []), "damaged"),
        (set_at("splits", 0, "samples", 8), "not as many samples"),
        (set_at("samples", "sha256", "0"), "altered"),
        (set_at("samples", {}), "damaged"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: Any, message: str) -> None:
    out = tmp_path / "out"
    pack(two_sets(tmp_path / "in"), out, PackOptions(32))
    edit_index(out, change)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("packed", out, "all", "all")
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(two_sets(tmp_path / "in"), out, PackOptions(32))
    samples = load_dataset("packed", out, "all", "all")
    shard = out / "shard-00000.tar"
    whole = shard.read_bytes()
    place = samples[0].image
    assert isinstance(place, PackedImage)
    shard.write_bytes(whole[: place.offset + 20] + b"\x00" + whole[place.offset + 21 :])
    with pytest.raises(ImageError) as caught:
        decode_image(place)
    assert caught.value.reason == Reason.CORRUPT and verify_shards(out) == ["shard-00000.tar"]
    shard.write_bytes(whole[: place.offset + 20])
    with pytest.raises(ImageError) as caught:
        decode_image(place)
    assert caught.value.reason == Reason.TRUNCATED
    with pytest.raises(DataError, match="bytes; wanted"):
        load_dataset("packed", out, "all")
    shard.unlink()
    with pytest.raises(ImageError) as caught:
        decode_image(place)
    assert caught.value.reason == Reason.UNREADABLE
    shard.write_bytes(whole)
    rows = (out / "samples.jsonl.gz").read_bytes()
    for broken in (rows[:-20], gzip.compress(b"{}\n" * 100), gzip.compress(b"0" * 50_000_000), b"no gzip at all"):
        (out / "samples.jsonl.gz").write_bytes(broken)
        with pytest.raises(DataError, match="altered"):
            load_dataset("packed", out, "all")
    (out / "index.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        load_dataset("packed", out, "all")


# --- Pairs


def captioned(folder: Path, count: int = 5) -> list[Pair]:
    """`count` images with captions of their own, and one more pair of the first image."""
    pairs = load_pairs(write_pairs(folder, count))
    return [*pairs, Pair(pairs[0].image, ("ä — 画像",), pairs[0].key, "elsewhere/more")]


def told(pairs: list[Pair]) -> list[tuple[Any, ...]]:
    return [(p.captions, p.key, p.source) for p in pairs]


def test_pairs_come_back_in_their_order(tmp_path: Path) -> None:
    pairs = captioned(tmp_path / "in")
    report = pack_pairs(pairs, tmp_path / "out", PackOptions(64, lossless=True), shard_bytes=3000)
    assert (report.num_pairs, report.num_captions, report.num_images) == (6, 11, 5) and report.num_shards >= 2
    assert report.num_bytes == sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) and not report.left_out
    packed = load_pairs(tmp_path / "out")
    assert told(packed) == told(pairs)
    for before, after in zip(pairs, packed, strict=True):
        assert np.array_equal(decode_image(before.image), decode_image(after.image))
    assert verify_shards(tmp_path / "out") == []
    pack_pairs(packed, tmp_path / "again", PackOptions(64, lossless=True), shard_bytes=3000)
    names = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_pack_of_pairs_is_none_of_samples_and_neither_overwrites_the_other(tmp_path: Path) -> None:
    pairs, splits = captioned(tmp_path / "a"), two_sets(tmp_path / "b")
    pack_pairs(pairs, tmp_path / "pairs")
    pack(splits, tmp_path / "samples", PackOptions(32))
    with pytest.raises(DataError, match="older pack of pairs"):
        pack_pairs(pairs, tmp_path / "samples")
    with pytest.raises(DataError, match="older pack of samples"):
        pack(splits, tmp_path / "pairs")
    with pytest.raises(DataError, match="wanted a folder that `miss data pack` wrote"):
        load_dataset("packed", tmp_path / "pairs", "all")
    with pytest.raises(DataError, match="holds no pairs"):
        load_pairs(tmp_path / "samples")
    (tmp_path / "samples" / "pairs.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match="another kind of pack"):
        load_pairs(tmp_path / "samples")
    pack_pairs(pairs[:2], tmp_path / "pairs")  # over an older pack of its kind
    assert len(load_pairs(tmp_path / "pairs")) == 2


def test_corrupt_images_stop_the_packing_or_are_left_out(tmp_path: Path) -> None:
    pairs = captioned(tmp_path / "in")
    whole = Path(str(pairs[0].image)).read_bytes()
    Path(str(pairs[0].image)).write_bytes(whole[:-100])  # two pairs have it
    with pytest.raises(ImageError, match="in/pairs/0.png: the PNG file ends early"):
        pack_pairs(pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = pack_pairs(pairs, tmp_path / "out", skip_corrupt=True)
    assert (report.num_pairs, report.num_images) == (4, 4) and len(report.left_out) == 1
    assert told(load_pairs(tmp_path / "out")) == told(pairs[1:5])
    for pair in pairs:
        Path(str(pair.image)).write_bytes(b"")
    with pytest.raises(DataError, match="none of 5 images can be decoded"):
        pack_pairs(pairs, tmp_path / "none", skip_corrupt=True)
    with pytest.raises(DataError, match="no pairs to pack"):
        pack_pairs([], tmp_path / "none")
    with pytest.raises(DataError, match="in/pairs/0.png names two images"):
        pack_pairs([*pairs, Pair(pairs[1].image, ("x",), pairs[0].key, "s")], tmp_path / "none")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("shards", 0, "name", "../secret.tar"), "plain file names"),
        (set_at("shards", 0, "name", "pipe:cat secret.tar"), "plain file names|no such file"),
        (set_at("images", 0, 2, 1 << 40), "outside"),
        (set_at("images", []), "damaged"),
        (set_at("pairs", "rows", 7), "not as many pairs"),
        (set_at("pairs", "sha256", "0"), "altered"),
        (set_at("pairs", None), "damaged"),
    ],
)
def test_an_index_of_pairs_that_lies(tmp_path: Path, change: Any, message: str) -> None:
    pack_pairs(captioned(tmp_path / "in"), tmp_path / "out")
    edit_index(tmp_path / "out", change)
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"image": 99, "captions": ["x"], "source": "s"},
        {"image": -1, "captions": ["x"], "source": "s"},
        {"image": "../../secret.png", "captions": ["x"], "source": "s"},
        {"image": 0, "captions": [], "source": "s"},
        {"image": 0, "captions": "text", "source": "s"},
        {"image": 0, "captions": [3], "source": "s"},
        {"captions": ["x"], "source": "s"},
        ["x"],
    ],
)
def test_rows_of_pairs_that_mean_nothing(tmp_path: Path, row: Any) -> None:
    out = tmp_path / "out"
    pack_pairs(captioned(tmp_path / "in"), out)
    body = (json.dumps(row) + "\n").encode()
    (out / "pairs.jsonl.gz").write_bytes(gzip.compress(body))
    said = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "rows": 1}
    edit_index(out, set_at("pairs", said))
    with pytest.raises(DataError, match="damaged"):
        load_pairs(out)


# --- A full disk


def run_pack(folder: Path, out: Path, max_file: int | None = None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if max_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))

    command = [sys.executable, "-m", "miss", "data", "pack", "--datasets", "jsonl", "--splits", "train", "--lossless"]
    command += ["--data", str(folder), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limit, env=environment)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    lines = []
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 255, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": "q", "answer": "a"}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    done = run_pack(folder, tmp_path / "out", max_file=100_000)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in"]
    done = run_pack(folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 samples, 12 images, 1 shards")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    done = run_pack(folder, tmp_path / "out", max_file=100_000)  # over an older pack, which stays whole
    assert done.returncode == 1
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before


# --- The real sets


def test_real_images_survive_packing(tmp_path: Path) -> None:
    """A sample of each set at 256 px: small, and within the loss that the README of a pack would state."""
    root = data_root()
    splits, num_images = {}, 0
    for name in ("slake", "vqa-rad", "vqa-med-2019"):
        rows = {s.image_key: s for s in load_dataset(name, root, "validate")}
        splits[(name, "validate")] = list(rows.values())[::16]
        num_images += len(splits[(name, "validate")])
    options = PackOptions()
    report = pack(splits, tmp_path / "out", options)
    assert report.num_images == num_images
    assert report.num_bytes / num_images < 40e6 / 4559
    noise = []
    for (name, split), rows in splits.items():
        for before, after in zip(rows, read_packed(tmp_path / "out", name, split), strict=True):
            small = shrink(decode_image(before.image), options).astype(float)
            noise.append(((decode_image(after.image) - small) ** 2).mean())
    psnr = 10 * np.log10(255**2 / np.maximum(noise, 1e-6))
    assert psnr.min() > 33 and psnr.mean() > 39, (psnr.min(), psnr.mean())
