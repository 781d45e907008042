"""A checkpoint is whole or not there: truncation, flipped bits, a full disk, crashes between any two system calls."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from miss.engine.training.checkpoint import (
    CheckpointCorrupt,
    CheckpointNotSaved,
    CheckpointStore,
    recover,
    replace_folder,
    verify,
    write_atomic,
)

ROOT = Path(__file__).resolve().parents[2]


def writer(step, size=500):
    def write(folder):
        save_file({"x": np.full(size, step, dtype=np.float32)}, folder / "model.safetensors")
        (folder / "deep").mkdir()
        (folder / "deep" / "state.json").write_text(f'{{"step": {step}}}')

    return write


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_keeps_the_last_ones_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep_last=2)
    for step in (10, 20, 30, 40):
        store.save(step, writer(step), keep=10)
    assert store.steps() == [40, 30, 10]
    assert (tmp_path / "c" / "latest").read_text() == "step-00000040\n"
    newest = store.newest()
    assert newest is not None and load_file(newest / "model.safetensors")["x"][0] == 40
    store.save(40, writer(41), keep=30)  # the same step again replaces it whole
    assert load_file(newest / "model.safetensors")["x"][0] == 41 and store.steps() == [40, 30]


def test_newer_ones_than_the_one_saved_count_for_nothing(tmp_path, capsys):
    """A run that went on from step 10, as 20 and 30 are damaged: its own next one is kept, and theirs go."""
    for step in (10, 20, 30):
        CheckpointStore(tmp_path, keep_last=3).save(step, writer(step))
    CheckpointStore(tmp_path, keep_last=1).save(11, writer(11), keep=10)
    assert CheckpointStore(tmp_path).steps() == [11, 10]
    assert capsys.readouterr().err.count("removed step") == 2


def test_nothing_there_is_none_and_all_broken_is_an_error(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "c")
    assert store.newest() is None
    for step in (1, 2):
        (store.save(step, writer(step)) / "model.safetensors").unlink()
    with pytest.raises(CheckpointCorrupt, match="no checkpoint in .* is whole"):
        store.newest()
    assert capsys.readouterr().err.count("warning: step-") == 2


def damage(path, rng):
    """Each file truncated at a few places, and single bits flipped all over: (what was done, content to restore)."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        raw = file.read_bytes()
        cuts = {0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(6))}
        flips = {rng.randrange(8 * len(raw)) for _ in range(40)}
        for cut in cuts:
            file.write_bytes(raw[:cut])
            yield f"{file.name} cut to {cut}"
        for bit in flips:
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            yield f"{file.name}, bit {bit}"
        file.write_bytes(raw + b"\0")
        yield f"{file.name} grown"
        file.write_bytes(raw)


def test_every_truncation_and_every_flipped_bit_is_found(tmp_path):
    path = CheckpointStore(tmp_path).save(7, writer(7))
    for what in damage(path, random.Random(4)):
        with pytest.raises(CheckpointCorrupt, match="step-00000007"):
            verify(path)
            pytest.fail(what)
    verify(path)
    (path / "extra").write_text("")
    with pytest.raises(CheckpointCorrupt, match="unexpected files: extra"):
        verify(path)


def test_a_damaged_one_gives_way_to_the_one_before_it_and_says_so(tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, writer(step))
    (tmp_path / "step-00000003" / "deep" / "state.json").write_text('{"step": 4}')
    newest = store.newest()
    assert newest is not None and newest.name == "step-00000002"
    message = capsys.readouterr().err
    assert "step-00000003: deep/state.json was altered" in message and "trying the one before" in message


@pytest.mark.parametrize("limit", [0, 64, 1500, 3900])
def test_a_full_disk_is_one_clear_error_and_the_old_checkpoint_stands(tmp_path, limit):
    """Writes beyond a size fail (EFBIG), first in the tensors' file, then in the files that follow."""
    store = CheckpointStore(tmp_path)
    store.save(1, writer(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointNotSaved, match="could not save .*step-00000002: File too large"):
            store.save(2, writer(2, size=4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["latest", "step-00000001"]
    verify(tmp_path / "step-00000001")
    store.save(2, writer(2))
    assert store.steps() == [2, 1]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotSaved, match="could not save"):
        CheckpointStore(tmp_path / "file" / "c").save(1, writer(1))


def test_other_errors_of_the_writer_pass_and_leave_nothing(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replace_folder(tmp_path / "best", broken)
    assert names(tmp_path) == []


@pytest.mark.parametrize("crash_at", range(12))
def test_a_crash_between_any_two_renames_leaves_the_old_or_the_new(tmp_path, monkeypatch, crash_at):
    """The process ends (here: an exception that nothing handles) at the n-th call that changes names or syncs."""

    class Crash(BaseException):
        pass

    store = CheckpointStore(tmp_path / "c", keep_last=1)
    store.save(1, writer(1))
    calls = iter(range(100))

    def crashing(real):
        def call(*args, **kwargs):
            if next(calls) == crash_at:
                raise Crash
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "fsync"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        patch.setattr("shutil.rmtree", crashing(__import__("shutil").rmtree))
        try:
            store.save(2, writer(2))
        except Crash:
            pass
    after = CheckpointStore(tmp_path / "c", keep_last=1)
    after.clean()
    newest = after.newest()
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    assert load_file(newest / "model.safetensors")["x"][0] == step in (1, 2)
    assert not [name for name in names(tmp_path / "c") if name.startswith(".aside")]


def test_recover_puts_the_old_folder_back(tmp_path):
    replace_folder(tmp_path / "best", writer(1))
    os.rename(tmp_path / "best", tmp_path / ".aside-old-best")
    (tmp_path / ".aside-new-best").mkdir()
    recover(tmp_path)
    assert names(tmp_path) == ["best"]


def test_atomic_file(tmp_path):
    write_atomic(tmp_path / "a", b"1")
    write_atomic(tmp_path / "a", b"22")
    assert (tmp_path / "a").read_bytes() == b"22" and names(tmp_path) == ["a"]
    with pytest.raises(CheckpointNotSaved):
        write_atomic(tmp_path / "missing" / "a", b"1")


CHILD = """
import sys
from tests.engine.test_checkpoint import writer
from miss.engine.training.checkpoint import CheckpointStore
from pathlib import Path
store = CheckpointStore(Path(sys.argv[1]), keep_last=2)
store.clean()
newest = store.newest()
step = int(newest.name[5:]) if newest else 0
print("ready", flush=True)
while True:
    step += 1
    store.save(step, writer(step, size=200_000))
"""


def kill_while_saving(folder, rng, kills):
    """Starts a process that saves without pause, kills it at random moments, and looks at what it left each time."""
    store, last = CheckpointStore(folder, keep_last=2), 0
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.5))
        child.send_signal(signal.SIGKILL)
        child.wait()
        newest = store.newest()
        step = int(newest.name.removeprefix("step-")) if newest else 0
        if newest:
            assert load_file(newest / "model.safetensors")["x"][0] == step
        assert step >= last, "a saved checkpoint was lost"
        last = step
    assert last > 0
    store.clean()
    assert not [name for name in names(folder) if name.startswith(".aside")]


def test_kill_9_while_saving(tmp_path):
    kill_while_saving(tmp_path, random.Random(1), 3)


@pytest.mark.torture
def test_kill_9_while_saving_often(tmp_path):
    kill_while_saving(tmp_path, random.Random(2), 20)
