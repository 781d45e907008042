"""Pretraining's steps: every pair once an epoch at any number of processes, and what goes wrong is said and counted."""

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.data.augment import Limits, View, augment, draw_view, hash64, hash64_each
from miss.engine.data.decoding import Processes, WorkerDied, decode_view
from miss.engine.data.images import ImageError, decode_image
from miss.engine.data.pack_pairs import pack_pairs
from miss.engine.data.pair_loader import CorruptLimit, PairLoader, PairStep, TooManyCorrupt, caption_number
from miss.engine.data.pair_sampler import PairSampler, share_of
from miss.engine.data.pairs import Pair, load_pairs
from miss.engine.data.paths import DataError
from miss.engine.data.processor import Processor
from miss.engine.data.quarantine import Quarantine
from miss.engine.data.shards import PackedImage, PackOptions
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from tests.engine.test_pairs import write_pairs
from tests.engine.tiny import tiny_config
from tests.helpers import data_root, run_python

LIMITS = Limits(rotate_degrees=10, crop_share=0.8, brightness=0.2, contrast=0.2)
sizes = st.integers(1, 40)
seeds = st.integers(0, 2**40)


# --- Which pairs a step has


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 60), seeds, st.integers(0, 5))
def test_every_pair_exactly_once_an_epoch(num_pairs: int, per_step: int, seed: int, epoch: int) -> None:
    sampler = PairSampler(num_pairs, per_step, seed)
    steps = range(epoch * num_pairs // per_step, ((epoch + 1) * num_pairs - 1) // per_step + 1)
    seen = [visit.index for n in steps for visit in sampler.visits(n) if visit.epoch == epoch]
    assert sorted(seen) == list(range(num_pairs))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 60), seeds, st.integers(0, 30), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_out_what_one_process_would_have(
    num_pairs: int, per_step: int, seed: int, step: int, world_size: int, parts: int
) -> None:
    visits = PairSampler(num_pairs, per_step, seed).visits(step)
    shares = [share_of(visits, rank, world_size, parts) for rank in range(world_size)]
    assert [v for share in shares for part in share for v in part] == visits
    lengths = [sum(len(part) for part in share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and all(len(share) == parts for share in shares)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 60), seeds, st.integers(0, 40))
def test_a_step_does_not_depend_on_what_was_asked_before(num_pairs: int, per_step: int, seed: int, step: int) -> None:
    walked = PairSampler(num_pairs, per_step, seed)
    history = [walked.step(n) for n in range(step + 1)]
    assert PairSampler(num_pairs, per_step, seed).step(step) == history[step]
    assert walked.step(0) == history[0]


def test_epochs_and_seeds_are_shuffled_differently_and_wrap_around() -> None:
    sampler = PairSampler(50, 50, 1)
    orders = [sampler.step(n) for n in range(3)] + [PairSampler(50, 50, 2).step(0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 5
    wrapping = PairSampler(5, 3, 1)
    assert [v.epoch for v in wrapping.visits(1)] == [0, 0, 1]
    assert Counter(wrapping.step(0) + wrapping.step(1)[:2]) == Counter(range(5))
    assert wrapping.steps_per_epoch == 2 and wrapping.epoch_of_step(5) == 3.0
    more = PairSampler(2, 5, 1).visits(0)
    assert [v.epoch for v in more] == [0, 0, 1, 1, 2]
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            PairSampler(*wrong, 0)
    with pytest.raises(ValueError, match="0 or more"):
        sampler.step(-1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-5, 2**64), max_size=3), st.lists(st.integers(0, 2**62), max_size=5))
def test_hashes_of_an_array_are_those_of_its_numbers(key: list[int], last: list[int]) -> None:
    assert hash64_each(np.array(last, dtype=np.int64), *key).tolist() == [hash64(*key, n) for n in last]


# --- What a step holds


def loader(pairs: list[Pair], processor: Processor, per_step: int = 4, **options: Any) -> PairLoader:
    return PairLoader(pairs, processor, per_step, options.pop("seed", 7), **options)


def take(made: PairLoader, count: int, first: int = 0) -> list[PairStep]:
    with closing(made.steps(first)) as steps:
        return list(islice(steps, count))


def same(a: PairStep, b: PairStep) -> bool:
    return a.keys == b.keys and all(
        torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(vars(p).values(), vars(q).values(), strict=True)
    )


def test_a_batch_is_what_the_processor_makes_of_the_pair(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 5))
    step = take(loader(pairs, processor, limits=LIMITS), 3)[2]
    batch = step[0]
    assert (batch.pixels.dtype, batch.ids.dtype, batch.lengths.dtype, batch.numbers.dtype) == (
        torch.uint8, torch.int64, torch.int32, torch.int64)  # fmt: skip
    visits = PairSampler(5, 4, 7).visits(2)
    for row, visit in enumerate(visits):
        pair = pairs[visit.index]
        view = draw_view(LIMITS, 7, visit.index, visit.epoch, 23)
        square = processor.image(decode_image(pair.image))
        assert np.array_equal(batch.pixels[row].numpy(), augment(square, view, processor.preprocess.background))
        ids = batch.ids[row, : batch.lengths[row]].tolist()
        assert ids in [processor.caption(text, 30)[0] for text in pair.captions]
        assert not batch.ids[row, batch.lengths[row] :].any()
        assert step.keys[0][row] == pair.key
    plain = take(loader(pairs, processor), 1)[0][0].pixels
    assert np.array_equal(plain[0].numpy(), processor.image(decode_image(pairs[PairSampler(5, 4, 7).step(0)[0]].image)))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (2, 1), (3, 2), (5, 1)])
def test_any_number_of_processes_has_the_same_step(
    tmp_path: Path, processor: Processor, world_size: int, accumulation: int
) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 6))
    whole = take(loader(pairs, processor, limits=LIMITS), 4)
    ranks = [
        take(loader(pairs, processor, rank=r, world_size=world_size, accumulation=accumulation, limits=LIMITS), 4)
        for r in range(world_size)
    ]
    for n in range(4):
        parts = [part for rank in ranks for part in rank[n]]
        assert torch.equal(torch.cat([part.pixels for part in parts]), whole[n][0].pixels)
        assert torch.equal(torch.cat([part.numbers for part in parts]), whole[n][0].numbers)
        ids = [row[:length].tolist() for part in parts for row, length in zip(part.ids, part.lengths, strict=True)]
        assert ids == [r[:k].tolist() for r, k in zip(whole[n][0].ids, whole[n][0].lengths, strict=True)]
        assert all(len(rank[n]) == accumulation for rank in ranks)


@pytest.mark.parametrize("options", [{"ahead": 0}, {"workers": 5, "ahead": 4}, {"processes": True}])
def test_resuming_and_workers_change_nothing(tmp_path: Path, processor: Processor, options: dict[str, Any]) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 7))
    walked = take(loader(pairs, processor, limits=LIMITS), 6)
    resumed = take(loader(pairs, processor, limits=LIMITS, **options), 3, first=3)
    assert [step.number for step in resumed] == [3, 4, 5]
    assert all(same(a, b) for a, b in zip(walked[3:], resumed, strict=True))


def test_every_caption_of_a_pair_is_drawn_about_as_often(tmp_path: Path, processor: Processor) -> None:
    (pair, *_) = load_pairs(write_pairs(tmp_path, 1))
    words = ("one", "two", "three", "ct", "mri")
    made = loader([Pair(pair.image, words, "k", "s")], processor, per_step=100)
    (step,) = take(made, 1)
    drawn = Counter(processor.decode(row[1:].tolist()) for row in step[0].ids)
    assert set(drawn) == set(words) and min(drawn.values()) >= 8


def test_captions_are_cut_and_counted(tmp_path: Path, processor: Processor) -> None:
    (pair, *_) = load_pairs(write_pairs(tmp_path, 1))
    long = Pair(pair.image, ("lung " * 50,), "long", "s")
    short = Pair(pair.image, ("lung",), "short", "s")
    made = loader([long, short, short, short], processor, max_tokens=10)
    (step,) = take(made, 1)
    assert step[0].ids.shape == (4, 10) and sorted(step[0].lengths.tolist()) == [3, 3, 3, 10]
    assert all(row[length - 1] == processor.sep for row, length in zip(step[0].ids, step[0].lengths, strict=True))
    assert (made.counts.pairs, made.counts.truncated, made.counts.truncated_share) == (4, 1, 0.25)


def test_equal_captions_have_one_number_and_others_their_own(processor: Processor) -> None:
    def number(text: str, most: int = 30) -> int:
        return caption_number(text, processor, most)

    assert number("A chest X-ray.") == number(" a chest  x-ray") == number("a chest x-ray !") >= 0
    assert len({number(text) for text in ("left lung", "right lung", "lung", "left")}) == 4
    # The model sees five words of these: all are the same to it.
    cut = ["ct of the left lung", "ct of the left lung.", "ct of the left lung . brain", "ct of the left lung brain"]
    assert len({number(text, 7) for text in cut}) == 1 and len({number(text) for text in cut}) == 3
    assert number("ct of the left . lung", 6) == number("ct of the left", 6)


def test_parts_without_pairs_are_ones_that_the_model_takes(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 2))
    steps = [take(loader(pairs, processor, per_step=2, rank=r, world_size=3), 1)[0] for r in range(3)]
    assert sorted(len(step[0].ids) for step in steps) == [0, 1, 1]
    empty = next(step[0] for step in steps if not len(step[0].ids))
    assert empty.pixels.shape == (0, 28, 28, 3) and empty.pixels.dtype == torch.uint8
    model = MissPretrain(tiny_config(vocabulary=len(processor.tokenizer.get_vocab())), ObjectiveConfig(8, 4))

    def gather(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        other = torch.ones(1, *rows.shape[1:], dtype=rows.dtype)
        return torch.cat([other, rows]), 1

    losses = model(empty, gather)
    losses.total.backward()
    assert torch.isfinite(losses.total)


# --- What cannot be used


def damage(pairs: list[Pair], processor: Processor) -> list[str]:
    """Cuts, removes and empties images of pairs 1 to 3; returns their keys."""
    paths = [pair.image for pair in pairs]
    assert all(isinstance(path, Path) for path in paths)
    paths[1].write_bytes(paths[1].read_bytes()[:-200])  # type: ignore[union-attr]
    paths[2].unlink()  # type: ignore[union-attr]
    paths[3].write_bytes(b"")  # type: ignore[union-attr]
    return [pair.key for pair in pairs[1:4]]


@pytest.mark.parametrize("processes", [False, True])
def test_corrupt_pairs_are_left_out_counted_and_written_down_once(
    tmp_path: Path, processor: Processor, processes: bool
) -> None:
    pairs = load_pairs(write_pairs(tmp_path / "in", 10))
    whole = take(loader(pairs, processor, limits=LIMITS), 5)
    keys = damage(pairs, processor)
    options: dict[str, Any] = {"limits": LIMITS, "quarantine": tmp_path / "run", "corrupt": CorruptLimit(10, 0.3)}
    made = loader(pairs, processor, processes=processes, **options)
    steps = take(made, 5)  # two epochs
    for before, after in zip(whole, steps, strict=True):
        kept = [i for i, key in enumerate(before.keys[0]) if key not in keys]
        assert after.keys[0] == [before.keys[0][i] for i in kept]
        assert torch.equal(after[0].pixels, before[0].pixels[kept])
        assert torch.equal(after[0].numbers, before[0].numbers[kept])
    assert made.counts.pairs == 20 and made.counts.dropped == {"truncated": 2, "not_found": 2, "empty": 2}
    records = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((r["key"], r["reason"]) for r in records) == list(
        zip(keys, ("truncated", "not_found", "empty"), strict=True)
    )
    assert all(pairs[r["index"]].key == r["key"] and r["message"] and r["source"] == "in/pairs" for r in records)
    # A resumed run, and another process of it, write none of them twice.
    options["corrupt"] = CorruptLimit(10, 0.9)  # a process may have the three in both epochs
    for rank in range(2):
        take(loader(pairs, processor, rank=rank, world_size=2, **options), 3, first=4)
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 3
    assert Quarantine(tmp_path / "run").counts() == {"truncated": 1, "not_found": 1, "empty": 1}


def test_what_was_made_ahead_and_not_given_out_is_not_counted(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path / "in", 8))
    pairs[PairSampler(8, 4, 7).step(1)[0]].image.unlink()  # type: ignore[union-attr]
    made = loader(pairs, processor, ahead=3, quarantine=tmp_path / "run")
    take(made, 1)
    assert made.counts.pairs == 4 and not made.counts.dropped and not (tmp_path / "run").exists()


def test_a_flipped_byte_in_a_shard_costs_one_pair(tmp_path: Path, processor: Processor) -> None:
    pack_pairs(load_pairs(write_pairs(tmp_path / "in", 6)), tmp_path / "out", PackOptions(32), shard_bytes=2000)
    pairs = load_pairs(tmp_path / "out")
    place = pairs[4].image
    assert isinstance(place, PackedImage)
    data = bytearray(place.shard.read_bytes())
    data[place.offset + place.size // 2] ^= 4
    place.shard.write_bytes(data)
    made = loader(pairs, processor, per_step=6, corrupt=CorruptLimit(100, 0.5), quarantine=tmp_path / "run")
    (step,) = take(made, 1)
    assert made.counts.dropped == {"corrupt": 1} and len(step[0].ids) == 5
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert record["key"] == pairs[4].key and "has been altered" in record["message"]


def test_a_caption_without_a_readable_character_is_set_aside(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 3))
    pairs[1] = Pair(pairs[1].image, ("\ufffd",), pairs[1].key, pairs[1].source)
    made = loader(pairs, processor, per_step=3, corrupt=CorruptLimit(3, 0.5))
    (step,) = take(made, 1)
    assert len(step[0].ids) == 2 and made.counts.dropped == {"empty_caption": 1}


def test_too_many_corrupt_pairs_stop_the_run_whenever_they_come(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 10))
    damage(pairs, processor)
    with pytest.raises(
        TooManyCorrupt, match=r"3 of the first \d+ pairs cannot be used; accepted: 20.0% of 10 \(1"
    ) as caught:
        take(loader(pairs, processor, corrupt=CorruptLimit(1000, 0.2)), 3)
    assert "\n" not in str(caught.value)
    take(loader(pairs, processor, corrupt=CorruptLimit(1000, 0.3)), 30)
    healthy = load_pairs(write_pairs(tmp_path / "b", 10))
    made = loader(healthy, processor, ahead=0)
    with closing(made.steps()) as steps, pytest.raises(TooManyCorrupt, match="of the last .* 50.0% of 10 .*not_found"):
        for step in steps:
            if step.number == 4:  # the disk goes away in the middle
                for pair in healthy:
                    pair.image.unlink()  # type: ignore[union-attr]
            assert step.number < 9


def test_the_list_survives_a_killed_writer_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    first, second = Quarantine(tmp_path), Quarantine(tmp_path)
    assert first.add([{"key": "a", "reason": "empty"}]) == 1
    with open(tmp_path / "quarantine.jsonl", "ab") as file:
        file.write(b'{"key": "b", "rea')
    assert second.add([{"key": "a", "reason": "empty"}, {"key": "c", "reason": "empty"}]) == 1
    assert first.add([{"key": "c", "reason": "empty"}, {"key": "c", "reason": "corrupt"}]) == 1
    assert first.counts() == second.counts() == {"empty": 2, "corrupt": 1}
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3
    (tmp_path / "quarantine.jsonl").write_text("my notes, which are longer than what was there before" * 9 + "\n")
    with pytest.raises(DataError, match="is no record"):
        Quarantine(tmp_path).add([{"key": "z", "reason": "empty"}])


def test_many_writers_write_each_sample_once(tmp_path: Path) -> None:
    lists = [Quarantine(tmp_path) for _ in range(4)]

    def write(one: Quarantine) -> None:
        for i in range(40):
            one.add([{"key": str(i), "reason": "empty"}])

    threads = [threading.Thread(target=write, args=(one,)) for one in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [json.loads(line)["key"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(keys, key=int) == [str(i) for i in range(40)]


# --- Workers


@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_named(tmp_path: Path, processor: Processor, name: signal.Signals) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 2))
    pool = Processes(processor.preprocess, 2, timeout=1.0 if name == signal.SIGSTOP else 60)
    try:
        pool.timeout = 60
        for worker in pool.workers:
            worker.timeout = 60
            worker.decode(pairs[0].image, View())
            worker.timeout = 1.0 if name == signal.SIGSTOP else 60
        victim = pool.workers[1]
        os.kill(victim.process.pid, name)
        asked = time.perf_counter()
        with pytest.raises(WorkerDied, match=rf"decoding worker 1 \(process {victim.process.pid}\)") as caught:
            for _ in range(4):
                pool.decode(pairs[0].image, View())
        assert time.perf_counter() - asked < 20
        assert ("signal 9" if name == signal.SIGKILL else "no answer for 1 s") in str(caught.value)
    finally:
        pool.close()
    assert all(worker.process.poll() is not None for worker in pool.workers)


def test_a_killed_worker_stops_the_steps(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 8))
    made = loader(pairs, processor, processes=True, workers=2, ahead=1)
    before = children()
    with closing(made.steps()) as steps:
        next(steps)
        workers = children() - before
        assert len(workers) == 2
        os.kill(min(workers), signal.SIGKILL)
        with pytest.raises(WorkerDied, match="ended by signal 9"):
            for _ in range(6):
                next(steps)
    assert not children() & workers


@pytest.mark.torture
def test_workers_killed_at_random_moments(tmp_path: Path, processor: Processor) -> None:
    """Twenty times: an error that names it within seconds, nothing left running, and the steps go on from there."""
    pairs = load_pairs(write_pairs(tmp_path, 30))
    random, number = np.random.default_rng(0), 0
    expected = take(loader(pairs, processor, limits=LIMITS), 200)
    for _ in range(20):
        made = loader(pairs, processor, processes=True, workers=3, limits=LIMITS)
        with closing(made.steps(number)) as steps:
            next(steps)
            victims = sorted(children())
            timer = threading.Timer(random.uniform(0, 0.05), os.kill, (victims[random.integers(3)], signal.SIGKILL))
            timer.start()
            asked = time.perf_counter()
            with pytest.raises(WorkerDied, match="ended by signal 9"):
                for step in steps:
                    number = step.number if step.number < 190 else 0
                    assert same(step, expected[step.number]) if step.number < 200 else time.sleep(0.01) is None
            assert time.perf_counter() - asked < 20
        assert not children()


def children() -> set[int]:
    """The processes that this one has started and that still run."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(folder.name))
    return found


def test_a_worker_answers_and_refuses_as_this_process_does(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path / "in", 3))
    pack_pairs(pairs, tmp_path / "out", PackOptions(32))
    pairs += load_pairs(tmp_path / "out")
    damage(pairs[:3] + pairs[:1], processor)
    pool = Processes(processor.preprocess, 1)
    try:
        for pair in pairs:
            view = draw_view(LIMITS, 5)
            try:
                expected = decode_view(pair.image, view, processor.preprocess)
            except ImageError as error:
                with pytest.raises(ImageError) as caught:
                    pool.decode(pair.image, view)
                assert (caught.value.reason, str(caught.value)) == (error.reason, str(error))
            else:
                assert np.array_equal(pool.decode(pair.image, view), expected)
    finally:
        pool.close()


def test_workers_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from miss.engine.data.decoding import Processes\n"
        "from miss.models.config import PreprocessConfig\n"
        "pool = Processes(PreprocessConfig(image_size=28), 2)\n"
        "print(*[w.process.pid for w in pool.workers], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python(code)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_worker_needs_no_torch() -> None:
    done = run_python("import sys, miss.engine.data.decode_worker; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_no_more_steps_are_begun_than_may_be_ahead(tmp_path: Path, processor: Processor) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 8))
    made = loader(pairs, processor, per_step=2, ahead=2)
    begun: list[int] = []
    visits = made.sampler.visits
    made.sampler.visits = lambda index: (begun.append(index), visits(index))[1]  # type: ignore[method-assign,func-returns-value]
    with closing(made.steps(5)) as steps:
        for given in range(5, 9):
            assert next(steps).number == given and begun == list(range(5, given + 3))


@pytest.mark.parametrize(
    "wrong", [{"rank": 2, "world_size": 2}, {"accumulation": 0}, {"workers": 0}, {"max_tokens": 2}]
)
def test_options_that_mean_nothing(tmp_path: Path, processor: Processor, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        loader(load_pairs(write_pairs(tmp_path, 1)), processor, **wrong)


# --- The real sets


def test_real_images(tmp_path: Path, processor: Processor) -> None:
    root = data_root()
    rows = [json.loads(line) for line in (root / "mednist" / "labels.jsonl").read_text().splitlines()][:24]
    (tmp_path / "m.jsonl").write_text(
        "".join(json.dumps({"image": r["image"], "captions": [f"a {r['label']}", r["label"]]}) + "\n" for r in rows)
    )
    slake = json.loads((root / "slake" / "train.json").read_text())
    names = list(dict.fromkeys(row["img_name"] for row in slake))[:8]
    (tmp_path / "s.csv").write_text("list,Caption\n" + "".join(f"{name},a scan\n" for name in names))
    pairs = load_pairs(tmp_path / "m.jsonl", root / "mednist") + load_pairs(tmp_path / "s.csv", root / "slake")
    made = loader(pairs, processor, per_step=10, accumulation=2, limits=LIMITS, quarantine=tmp_path / "run")
    steps = take(made, 7)
    assert made.counts.pairs == 70 and not made.counts.dropped and not (tmp_path / "run").exists()
    keys = Counter(key for step in steps for part in step.keys for key in part)
    assert sum(keys.values()) == 70 and min(keys.values()) >= 2 and len(keys) == 32
    scans = {int(n) for step in steps for part, ks in zip(step, step.keys, strict=True)
             for n, key in zip(part.numbers, ks, strict=True) if key.startswith(f"{tmp_path.name}/s/")}  # fmt: skip
    assert len(scans) == 1
