"""What a rank of `test_rank_faults.py` does: a command of ours with a fault planted in this process, or in one rank."""

import os
import random
import resource
import shutil
import signal
import time
from contextlib import closing
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 (imported before the fork, as are those of torch: seconds less for each run)
import torch
import torch._dynamo
import torch._inductor  # noqa: F401

from miss.cli import _guarded, run
from miss.cli import finetune as finetune_command  # noqa: F401
from miss.engine.data.loader import GroupedLoader, GroupedSampler
from miss.engine.data.pair_loader import CorruptLimit, PairLoader
from miss.engine.data.pairs import load_pairs
from miss.engine.data.processor import Processor
from miss.engine.training.checkpoint import CheckpointCorrupt, CheckpointNotSaved, verify
from miss.engine.training.finetune import make_engine
from miss.engine.training.optimizer import freeze
from miss.engine.training.pretrain_validation import PairValidation
from miss.engine.training.ranks import Ranks
from miss.engine.training.trainer import Trainer
from tests.engine.tiny import RandomTokens, tiny_model, tiny_rows, tiny_train_config


def command(rank, words, plants=()):
    """`miss WORDS…`, with faults: each is the name of a function here and what it takes."""
    for name, *values in plants:
        globals()[name](rank, *values)
    return run(words)


# ---- faults ----


def before_step(action):
    """Calls action(step) in the thread of the loop, before each step's passes."""
    before = Trainer._step

    def step(self, work, interval):
        action(self, work)
        before(self, work, interval)

    Trainer._step = step


def killed_as_deepspeed_starts(rank, whose):
    """Joined, and gone before DeepSpeed makes its groups: the other waits for it there."""
    import deepspeed

    if rank == whose:
        deepspeed.initialize = lambda **_: os.kill(os.getpid(), signal.SIGKILL)


def slow(rank, seconds):
    before_step(lambda trainer, work: time.sleep(seconds))


def nan_in_batch(rank, whose, index):
    build = GroupedLoader.build

    def spoilt(self, number):
        step = build(self, number)
        if rank == whose and number == index:
            tokens = step.parts[-1].batch.image_tokens
            tokens[-1] = float("nan")
        return step

    GroupedLoader.build = spoilt


def nan_in_gradient(rank, whose, index):
    def plant(trainer, work):
        if rank == whose and work.index == index:
            trainer.model.get_parameter("encoder.layers.0.mlp.input.weight").register_hook(lambda g: g * float("nan"))

    before_step(plant)


def nan_in_features(rank, whose, index):
    """Of the last image of this rank's part: what a tower of pretraining gives of it."""

    def spoil(module, inputs, output):
        output = output.clone()
        output[-1] = float("nan")
        return output

    def plant(trainer, work):
        if rank == whose and work.index == index:
            trainer.model.image_projection.register_forward_hook(spoil)

    before_step(plant)


def nan_in_words(rank, whose, index):
    """The gradient of this rank's own language modelling loss."""

    def plant(trainer, work):
        if rank == whose and work.index == index:
            trainer.model.get_parameter("decoder.head.bias").register_hook(lambda g: g * float("inf"))

    before_step(plant)


def kill_worker(rank, whose, index):
    def plant(trainer, work):
        if rank == whose and work.index == index:
            os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), 9)

    before_step(plant)


def send(rank, whose, index, number, times=1):
    """The signal, to this process, between two steps: `whose` is a rank, or -1 for all."""

    def plant(trainer, work):
        if whose in (rank, -1) and work.index == index:
            for _ in range(times):
                os.kill(os.getpid(), number)

    before_step(plant)


def stand_still(rank, whose, index):
    """A rank that waits for ever at a step; what it is waited for, by the others, is inside a library."""

    def plant(trainer, work):
        if rank == whose and work.index == index:
            while True:
                signal.pause()

    before_step(plant)


def broken(rank, whose, index):
    def plant(trainer, work):
        if rank == whose and work.index == index:
            raise MemoryError("a rank's own misfortune")

    before_step(plant)


def broken_validation(rank, whose):
    """Only this rank's validation ends by an error."""
    before = PairValidation.__call__

    def validate(self, model):
        if rank == whose:
            raise MemoryError("a rank's own misfortune")
        return before(self, model)

    PairValidation.__call__ = validate


def fill_disk(rank, folder, index):
    """From this step on nothing fits on it."""

    def plant(trainer, work):
        if rank == 0 and work.index == index:
            fill(Path(folder) / "filler", 0)

    before_step(plant)


def failing_export(rank):
    """From here on this process's files end at 60 kB: the whole model does not fit, the log does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


# ---- a trainer of its own: saving on a full disk, damaged checkpoints ----


def trainer_of(ranks, output, engine, stage, **values):
    config = tiny_train_config(
        data={"images_per_step": 4}, ema={"decay": 0.9}, engine=engine, zero_stage=stage, log={"every": 1}, **values
    )
    rows, model = tiny_rows(), tiny_model(dropout=0.1)
    freeze(model, config.optimizer, config.train_vision)
    sampler = GroupedSampler([len(r) for r in rows], None, 4, 2, config.seed)
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    loader = GroupedLoader(sampler, rows, RandomTokens(len(rows)), 1, 2, **place)
    copy, engine = make_engine(config, model, ranks)

    def export(folder):
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_bytes(b"x" * 100_000)

    return Trainer(
        model, loader, engine, config, Path(output), device=ranks.device, ranks=ranks, copy=copy, export=export
    )


def fails(work, kind, words):
    try:
        work()
    except kind as error:
        assert words in str(error), str(error)
        return True
    return False


def full_disk(rank, folder, engine, stage, every):
    """A file system that has room for one checkpoint and 0, 1, 2, … more pages: every save fails on all ranks with the
    system's words and the checkpoint before it stands, until there is room for another."""
    with Ranks.from_environment("cpu", 30) as ranks:
        output = Path(folder) / "run"
        trainer = trainer_of(ranks, output, engine, stage)
        trainer.fit(2)
        store, filler, free, failures = trainer.store, Path(folder) / "filler", 0, 0
        fills = lambda: ranks.on_first(lambda: fill(filler, free))  # noqa: E731
        while True:
            fills()
            trainer.progress.step = 3
            if not fails(trainer.save, CheckpointNotSaved, "No space left on device"):
                break
            failures, free = failures + 1, free + every
            if ranks.first:
                if store.steps() == [3, 2]:  # all of it found room but the new `latest`, which may lag behind
                    assert store.newest() == store.folder / "step-00000003"
                    verify(store.newest())
                    shutil.rmtree(store.newest())
                assert sorted(p.name for p in store.folder.iterdir()) == ["latest", "step-00000002"]
                verify(store.folder / "step-00000002")
                assert (store.folder / "latest").read_text() == "step-00000002\n"
            if failures % 7 == 1:
                ranks.on_first(lambda: shutil.rmtree(output / "best", ignore_errors=True))  # its bytes would be room
                fills()
                assert fails(lambda: trainer._export("best"), CheckpointNotSaved, "No space left") or free > 100_000
        assert failures > 2 and ranks.all_true(not ranks.first or store.steps() == [3, 2])
        if ranks.first:
            verify(store.folder / "step-00000003")
            (Path(folder).parent / "failures").write_text(str(failures))
            filler.unlink()
            shutil.rmtree(output)
    return 0


def fill(filler, free):
    """Takes all but `free` bytes of the file system."""
    filler.unlink(missing_ok=True)
    place = os.statvfs(filler.parent)
    filler.write_bytes(bytes(max(0, place.f_bavail * place.f_bsize - free)))


def limited_files(rank, folder, engine, stage):
    """The same where a file may not grow beyond a size: each of a checkpoint's files is too long in turn."""
    with Ranks.from_environment("cpu", 30) as ranks:
        trainer = trainer_of(ranks, Path(folder) / "limited", engine, stage)
        trainer.fit(2)
        sizes = sorted(p.stat().st_size for p in trainer.store.newest().iterdir())
        for size in [0, *(size - 1 for size in sizes)]:
            trainer.progress.step = 3
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            failed = fails(trainer.save, CheckpointNotSaved, "File too large")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert failed and trainer.store.steps() == [2]
            ranks.barrier()
            verify(trainer.store.folder / "step-00000002")
            ranks.barrier()
    return 0


def damaged(rank, folder, engine, stage, cuts):
    """Every file of a checkpoint cut short and with a flipped bit: no rank goes on from it, all go on from the one
    before."""
    rng = random.Random(5)
    with Ranks.from_environment("cpu", 30) as ranks:
        trainer = trainer_of(ranks, Path(folder) / "damaged", engine, stage, checkpoint={"every": 2})
        trainer.fit(4)
        store = trainer.store
        names = sorted(p.name for p in (store.folder / "step-00000004").iterdir())
        assert {"random-1.safetensors", "optimizer.safetensors", "average.safetensors"} <= set(names)
        for name in names:
            path = store.folder / "step-00000004" / name
            raw = ranks.on_first(path.read_bytes)
            for bit in [None, *(rng.randrange(8 * len(raw)) for _ in range(cuts if raw else 0))]:
                changed = bytearray(raw[:-1] if bit is None else raw)
                if bit is not None:
                    changed[bit // 8] ^= 1 << bit % 8
                ranks.on_first(lambda path=path, changed=changed: path.write_bytes(changed))
                assert fails(lambda: trainer.resume(store.folder / "step-00000004"), CheckpointCorrupt, "step-00000004")
                newest = ranks.on_first(store.newest)
                assert newest.name == "step-00000002", (name, bit)
            ranks.on_first(lambda path=path, raw=raw: path.write_bytes(raw))
        trainer.resume(ranks.on_first(store.newest))
        assert trainer.progress.step == 4
    return 0


# ---- data ----


def pairs(rank, folder, fault):
    """Pairs decoded ahead; a sum over ranks stands for the step. Rank 1 meets the fault alone."""
    return _guarded("pairs", lambda: _pairs(rank, Path(folder), fault))


def _pairs(rank, folder, fault):
    with Ranks.from_environment("cpu", 30) as ranks:
        source = folder / ("bad" if rank == 1 and fault != "worker" else "good")
        given = load_pairs(source / "packed" if fault == "shard" else source / "pairs.jsonl")
        place = {"rank": rank, "world_size": ranks.world_size, "quarantine": folder}
        options = {"workers": 1, "processes": fault == "worker", "corrupt": CorruptLimit(8, 0.3)}
        loader = PairLoader(given, Processor.from_folder(folder / "start"), 8, 3, **place, **options)
        ranks.barrier()
        if fault == "shard" and rank == 1:  # after its index was read
            for shard in (source / "packed").glob("*.tar"):
                raw = shard.read_bytes()
                shard.write_bytes(raw[:1024] + bytes(len(raw) - 1024))
        with closing(loader.steps()) as steps:
            for step in steps:
                ranks.reduce_sum(torch.tensor(float(len(step))))
                if fault == "worker" and rank == 1 and step.number == 3:
                    os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), 9)
    return 0
