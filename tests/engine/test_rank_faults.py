"""Faults of one of two ranks: both end, with words and a documented exit code (docs/faults.md), and nothing is lost.

Ranks are forked from one process that has imported everything (`fault_launcher.py`) and run the command line itself;
one test, and more in `make torture`, has torchrun start them.
"""

import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from miss.engine.data.pack_pairs import pack_pairs
from miss.engine.data.pairs import load_pairs
from miss.engine.training.checkpoint import CheckpointStore, verify
from miss.engine.training.log import read_log
from tests.engine.test_cli_finetune import write_checkpoint, write_data
from tests.engine.test_pairs import write_pairs
from tests.engine.tiny_pairs import tiny_pretrain_values, write_start
from tests.engine.tiny_pairs import write_pairs as write_coloured_pairs

ROOT = Path(__file__).resolve().parents[2]
HAS_ZERO = importlib.util.find_spec("deepspeed") is not None
LIMIT = 60.0  # seconds within which all ranks must have ended
needs_zero = pytest.mark.skipif(not HAS_ZERO, reason="needs the package deepspeed")


def namespace():
    """What gives a process a mount table of its own here; None where nothing does."""
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        try:
            done = subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
        except OSError:
            return None
        if done.returncode == 0:
            return words
    return None


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """Two ranks that were started: their processes, and how each ended."""

    def __init__(self, launcher, folder):
        self.launcher, self.folder, self.ended = launcher, folder, {}
        self.processes = launcher.line(60)
        self.started = time.monotonic()

    def wait(self, seconds=LIMIT):
        """Exit codes by rank; whoever is left after so many seconds is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        while len(self.ended) < len(self.processes):
            told = self.launcher.line(deadline - time.monotonic())
            if told is None:
                for rank, process in enumerate(self.processes):
                    if rank not in self.ended:
                        os.kill(process, signal.SIGKILL)
                while len(self.ended) < len(self.processes):
                    told = self.launcher.line(10)
                    self.ended[told["rank"]] = told
                pytest.fail(f"still there after {seconds:.0f} s: {self.texts()}")
            self.ended[told["rank"]] = told
        return [self.ended[rank]["code"] for rank in range(len(self.processes))]

    def one_ended(self, rank, seconds=LIMIT):
        """Waits for this rank only."""
        while rank not in self.ended:
            told = self.launcher.line(seconds)
            assert told is not None, self.texts()
            self.ended[told["rank"]] = told
        return self.ended[rank]["code"]

    def text(self, rank):
        return "".join((self.folder / f"rank{rank}.{name}").read_text() for name in ("out", "err"))

    def texts(self):
        return [self.text(rank)[-3000:] for rank in range(len(self.processes))]


class Launcher:
    def __init__(self, folder, *flags, words=()):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        command = [*words, sys.executable, "-m", "tests.engine.fault_launcher", *map(str, flags)]
        pipe = subprocess.PIPE
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, env=environment, bufsize=0)

    def start(self, case, *arguments, world_size=2):
        self.count += 1
        folder = self.folder / f"told{self.count}"
        folder.mkdir()
        work = {"case": case, "world_size": world_size, "port": free_port(), "folder": str(folder)}
        self.process.stdin.write(json.dumps({**work, "arguments": arguments}).encode() + b"\n")
        return Run(self, folder)

    def line(self, seconds):
        if not select.select([self.process.stdout], [], [], max(0.0, seconds))[0]:
            return None
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, a data set, a configuration of 24 steps: a line of the log every 4, a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoint(folder / "start")
    write_data(folder / "data")
    source = {"dataset": "jsonl", "root": str(folder / "data")}
    config = {
        "init": str(folder / "start"),
        "device": "cpu",
        "bf16": False,
        "model": {"dropout": 0.1},
        "data": {
            "train": [source],
            "validation": [{**source, "split": "validate"}],
            "images_per_step": 4,
            "questions_per_image": 0,
            "cache": str(folder / "cache"),
            "exclude_leaks": False,
        },
        "optimizer": {"rate_new": 1e-2, "rate_text": 3e-3},
        "schedule": {"total_steps": 24, "warmup_steps": 5},
        "checkpoint": {"every": 3},
        "validation": {"every": 10, "batch_questions": 2},
        "log": {"every": 4, "ceiling": False, "tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "pre").mkdir()
    write_start(folder / "pre" / "start")
    write_coloured_pairs(folder / "pre" / "pairs", 20)
    own = {name: config[name] for name in ("schedule", "checkpoint", "log")}
    values = tiny_pretrain_values(folder / "pre", **own, validation={"every": 10, "pairs": 4, "batch_pairs": 4})
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def launcher(place):
    made = Launcher(place, *(["--zero"] if HAS_ZERO else []))
    yield made
    made.close()


def finetune(launcher, place, output, *flags, plants=()):
    words = ["finetune", "--config", str(place / "config.yaml"), "--output", str(place / output), *flags]
    return launcher.start("command", words, plants)


def pretrain(launcher, place, output, *flags, plants=()):
    words = ["pretrain", "--config", str(place / "pretrain.yaml"), "--output", str(place / output), *flags]
    return launcher.start("command", words, plants)


ENGINES = {"plain": (), **{f"zero{n}": ("--engine", "zero", "--zero-stage", str(n)) for n in (1, 2, 3)}}


@pytest.fixture(scope="module")
def undisturbed(launcher, place):
    """A run that nothing happens to, by command, engine and number of steps: made when it is first asked for."""
    made = {}

    def run(engine="plain", steps=24, command=finetune):
        key = f"whole-{command.__name__}-{engine}-{steps}"
        if key not in made:
            ended = command(launcher, place, key, *ENGINES[engine], "--schedule.total-steps", str(steps))
            assert ended.wait(240) == [0, 0], ended.texts()
            made[key] = place / key
        return made[key]

    return run


TIMES = {"time", "seconds", "s_per_step", "data_wait_share", "resident_gb"}


def curve(output):
    """What the log says, without what a clock said."""
    return [
        {name: value for name, value in line.items() if name not in TIMES and not name.endswith("_s")}
        for line in read_log(output / "log.jsonl")
        if line["kind"] in ("train", "validation")
    ]


def assert_same_run(a, b):
    """The loss curve, and everything that the last checkpoint holds, bit for bit."""
    assert curve(a) == curve(b) and len(curve(a)) > 5
    one, other = (CheckpointStore(folder / "checkpoints").newest() for folder in (a, b))
    assert one.name == other.name
    assert (one / "state.json").read_bytes() == (other / "state.json").read_bytes()
    for path in one.glob("*.safetensors"):
        tensors, others = load_file(path), load_file(other / path.name)
        assert tensors.keys() == others.keys()
        assert not [name for name, t in tensors.items() if not torch.equal(t, others[name])], path.name


def until(condition, seconds=LIMIT):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_done(output):
    return max((line["step"] for line in read_log(output / "log.jsonl")), default=0)


# ---- a rank that is killed, or stands still ----


def killed_again_and_again(launcher, place, undisturbed, engine, kills, seed, command=finetune):
    """kill -9 of either rank at random moments: while joining and reading, or (two in three) once the log has grown,
    in a step, a validation or a save; and the same command again."""
    rng, steps, longest = random.Random(seed), 24 + 12 * kills, [0.0, 0.0]
    name, total = f"killed-{command.__name__}-{engine}-{kills}", ("--schedule.total-steps", str(steps))
    waits = ("--rank-timeout", "20")  # for one that is killed before it joined: a launcher would end the other
    whole = undisturbed(engine, steps, command)
    for kill in range(kills):
        before = steps_done(place / name)
        run = command(launcher, place, name, *ENGINES[engine], *total, *waits, plants=[("slow", 0.01)])
        if kill % 3:
            until(lambda before=before: steps_done(place / name) > before)
        time.sleep(rng.uniform(0.0, 0.2 if kill % 3 else 1.5))
        victim = rng.randrange(2)
        os.kill(run.processes[victim], signal.SIGKILL)
        killed = time.monotonic()
        codes = run.wait()
        longest[kill % 3 > 0] = max(longest[kill % 3 > 0], time.monotonic() - killed)
        assert codes[victim] == -9, f"the run was over before it could be killed: {run.texts()}"
        assert codes[1 - victim] in (75, 1) and f"rank {victim} was killed or stands still" in run.text(1 - victim)
    last = command(launcher, place, name, *ENGINES[engine], *total)
    assert last.wait(240) == [0, 0], last.texts()
    assert_same_run(whole, place / name)
    ended = f"{longest[1]:.1f} s, {longest[0]:.1f} s where it still waited to join"
    print(f"{command.__name__}, {engine}: {kills} kills, the other rank ended within {ended}")


def test_kill_9_of_a_rank(launcher, place, undisturbed):
    killed_again_and_again(launcher, place, undisturbed, "plain", 2, 1)


@pytest.mark.torture
@pytest.mark.parametrize("engine", ["plain", pytest.param("zero2", marks=needs_zero)])
def test_kill_9_of_a_rank_often(launcher, place, undisturbed, engine):
    killed_again_and_again(launcher, place, undisturbed, engine, 20, 2)


@needs_zero
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.torture)])
def test_kill_9_of_a_rank_that_pretrains(launcher, place, undisturbed, kills):
    """With the momentum twin, the queue and ZeRO-2."""
    killed_again_and_again(launcher, place, undisturbed, "zero2", kills, 4, pretrain)


@pytest.mark.torture
@needs_zero
@pytest.mark.parametrize("engine", ["zero1", "zero3"])
def test_kill_9_under_the_other_stages(launcher, place, undisturbed, engine):
    killed_again_and_again(launcher, place, undisturbed, engine, 4, 3)


@needs_zero
@pytest.mark.parametrize("whose", [1, pytest.param(0, marks=pytest.mark.torture)])
def test_kill_9_of_a_rank_while_deepspeed_starts(launcher, place, whose):
    """Its groups wait as long as the run's ranks do, not PyTorch's half hour."""
    flags = ("--zero", "2", "--rank-timeout", "5")
    run = pretrain(launcher, place, f"starting{whose}", *flags, plants=[("killed_as_deepspeed_starts", whose)])
    codes = run.wait(40)
    assert codes[whose] == -9 and codes[1 - whose] == 75, run.texts()
    assert f"rank {whose} was killed or stands still" in run.text(1 - whose)


def torchrun(place, output, kills, rng, *flags):
    """torchrun with restarts; so many times one of its two processes is killed when the log has grown."""
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills), "-m", "miss", "finetune"]
    words += ["--config", str(place / "config.yaml"), "--output", str(place / output), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu"}
    with open(place / f"{output}.txt", "wb") as told:
        parent = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words], cwd=ROOT, env=environment, stdout=told, stderr=told
        )
    try:
        for kill in range(kills):
            before = steps_done(place / output)
            if kill % 3 == 1:  # while they start: torchrun itself ends the one that waits
                until(lambda: len(children(parent.pid)) == 2)
                time.sleep(rng.uniform(0.0, 3.0))
            else:
                until(lambda before=before: parent.poll() is not None or steps_done(place / output) > before + 4)
            assert parent.poll() is None, (place / f"{output}.txt").read_text()
            os.kill(rng.choice(children(parent.pid)), signal.SIGKILL)
        assert parent.wait(120) == 0, (place / f"{output}.txt").read_text()[-3000:]
    finally:
        parent.kill()
        parent.wait()
    return (place / f"{output}.txt").read_text()


def children(process):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
            command = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == process and b"finetune" in command:
            found.append(int(entry.parent.name))
    return found


def test_torchrun_restarts_and_the_curve_is_the_same(place, undisturbed):
    steps = ("--schedule.total-steps", "72")
    told = torchrun(place, "restarted", 1, random.Random(6), *steps)
    assert "going on from" in told
    assert_same_run(undisturbed("plain", 72), place / "restarted")


@pytest.mark.torture
@needs_zero
def test_torchrun_restarts_often(place, undisturbed):
    flags = ("--schedule.total-steps", "240", *ENGINES["zero2"])
    torchrun(place, "restarted-often", 5, random.Random(7), *flags)
    assert_same_run(undisturbed("zero2", 240), place / "restarted-often")


@pytest.mark.parametrize("still", [0, pytest.param(1, marks=pytest.mark.torture)])
def test_a_rank_that_stands_still_is_named_after_the_timeout(launcher, place, still):
    """SIGSTOP; rank 0 also holds the store where the others would look for reasons."""
    output = place / f"still{still}"
    flags = ("--rank-timeout", "3", "--schedule.total-steps", "100000", "--validation.every", "0")
    run = finetune(launcher, place, output.name, *flags)
    until(lambda: steps_done(output) > 4)
    os.kill(run.processes[still], signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.one_ended(1 - still) == 75, run.text(1 - still)
    print(f"rank {still} stood still: the other ended within {time.monotonic() - stopped:.1f} s")
    assert f"rank {still} was killed or stands still" in run.text(1 - still)
    os.kill(run.processes[still], signal.SIGKILL)
    assert run.wait()[still] == -9


# ---- numbers that are not finite ----

ALWAYS = [("plain", "nan_in_batch"), ("plain", "nan_in_gradient")]
OFTEN = [(f"zero{stage}", fault) for stage in (1, 2, 3) for fault in ("nan_in_batch", "nan_in_gradient")]


@pytest.mark.parametrize(
    ("engine", "fault"), [*ALWAYS, *(pytest.param(*case, marks=[needs_zero, pytest.mark.torture]) for case in OFTEN)]
)
def test_a_nan_on_one_rank_stops_all_before_the_update(launcher, place, engine, fault):
    """Step 7 of rank 1; the checkpoint of step 6 is the newest, and its weights are what training stopped with."""
    output = place / f"{fault}-{engine}"
    flags = (*ENGINES[engine], "--data.accumulation", "2")
    run = finetune(launcher, place, output.name, *flags, plants=[(fault, 1, 6)])
    assert run.wait() == [1, 1], run.texts()
    file = json.loads((output / "not-finite.json").read_text())
    ranks = {each["rank"]: each for each in file["ranks"]}
    named = ranks[1]["loss" if fault == "nan_in_batch" else "gradient"]
    assert file["step"] == 7 and named and set(named) <= set(ranks[1]["share"])
    assert not ranks[0]["loss"] and not ranks[0]["gradient"]
    assert not set(ranks[0]["share"]) & set(ranks[1]["share"])
    for rank in range(2):
        text = run.text(rank)
        assert "step 7: " in text and "stopped before the update" in text and "Traceback" not in text
        assert f"Rows: rank 1: {', '.join(named)}." in text
    if fault == "nan_in_gradient":
        assert ranks[1]["parameters"] == ["encoder.layers.0.mlp.input.weight"]
    newest = CheckpointStore(output / "checkpoints").newest()
    assert newest.name == "step-00000006"
    assert all(t.isfinite().all() for p in newest.glob("*.safetensors") for t in load_file(p).values())


@needs_zero
@pytest.mark.parametrize("fault", ["nan_in_features", pytest.param("nan_in_words", marks=pytest.mark.torture)])
def test_a_nan_on_one_rank_stops_pretraining_before_the_update(launcher, place, fault):
    """Features of pairs go over all ranks; those of the rank that has it are named all the same."""
    output = place / fault
    run = pretrain(launcher, place, output.name, "--zero", "2", "--data.accumulation", "2", plants=[(fault, 1, 6)])
    assert run.wait() == [1, 1], run.texts()
    file = json.loads((output / "not-finite.json").read_text())
    ranks = {each["rank"]: each for each in file["ranks"]}
    named = ranks[1]["gradient"]
    assert file["step"] == 7 and named == ranks[1]["share"] and len(named) == 4
    assert not ranks[0]["loss"] and not ranks[0]["gradient"]
    assert all(f"Rows: rank 1: {', '.join(named)}." in run.text(rank) for rank in range(2)), run.texts()
    newest = CheckpointStore(output / "checkpoints").newest()
    assert newest.name == "step-00000006"
    assert all(t.isfinite().all() for p in newest.glob("*.safetensors") for t in load_file(p).values())


# ---- signals ----


TERM, INT = (signal.SIGTERM, 143), (signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("number", "code", "whose"),
    [
        (*TERM, 1),
        (*TERM, -1),
        (*INT, 0),
        *(pytest.param(*n, w, marks=pytest.mark.torture) for n, w in ((TERM, 0), (INT, 1), (INT, -1))),
    ],
)
def test_a_signal_to_any_rank_is_all_ranks_signal(launcher, place, undisturbed, number, code, whose):
    output = place / f"signal-{whose}-{int(number)}"
    run = finetune(launcher, place, output.name, plants=[("send", whose, 7, int(number))])
    assert run.wait() == [code, code], run.texts()
    assert run.text(0).count(f"{number.name}: saved") == 1 and "saved" not in run.text(1)
    newest = CheckpointStore(output / "checkpoints").newest()
    assert newest.name == "step-00000008" and (output / "last" / "model.safetensors").exists()
    if whose == 1:
        run = finetune(launcher, place, output.name)
        assert run.wait() == [0, 0], run.texts()
        assert_same_run(undisturbed(), output)


def test_a_second_sigint_leaves_at_once_also_while_others_are_waited_for(launcher, place):
    """Rank 1 stands still at step 7, rank 0 waits for it in a call that knows no signals."""
    run = finetune(launcher, place, "second", plants=[("stand_still", 1, 6)])
    until(lambda: steps_done(place / "second") >= 4)
    time.sleep(0.5)
    for _ in range(2):
        os.kill(run.processes[0], signal.SIGINT)
        time.sleep(0.2)
    asked = time.monotonic()
    assert run.one_ended(0) == 130 and "left at once" in run.text(0)
    assert time.monotonic() - asked < 6
    for _ in range(2):
        os.kill(run.processes[1], signal.SIGINT)
        time.sleep(0.2)
    assert run.wait() == [130, 130]
    assert CheckpointStore(place / "second" / "checkpoints").newest().name == "step-00000006"


# ---- the disk, and what is on it ----


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A launcher whose processes, and only these, see a file system of 4 MB."""
    words = namespace()
    if words is None:
        pytest.skip("mounting a small file system needs root or user namespaces")
    folder = tmp_path_factory.mktemp("disk")
    (folder / "small").mkdir()
    made = Launcher(folder, "--disk", folder / "small", 4 << 20, words=words)
    yield made, folder / "small"
    made.close()


def test_a_full_disk_at_any_write_of_a_checkpoint(small_disk):
    launcher, small = small_disk
    run = launcher.start("full_disk", str(small), "plain", 0, 1 << 16)
    assert run.wait() == [0, 0], run.texts()
    assert int((small.parent / "failures").read_text()) > 5


@pytest.mark.torture
@needs_zero
def test_a_full_disk_at_every_page_of_a_checkpoint(small_disk):
    launcher, small = small_disk
    run = launcher.start("full_disk", str(small), "zero", 2, 1 << 12)
    assert run.wait(300) == [0, 0], run.texts()
    print(f"{(small.parent / 'failures').read_text()} saves failed, each leaving the one before")


@pytest.mark.parametrize("index", [0, pytest.param(3, marks=pytest.mark.torture)])
def test_a_full_disk_ends_the_command_on_all_ranks(small_disk, place, index):
    """It is full at the first checkpoint, or, with one written, at a line of the log."""
    launcher, small = small_disk
    run = finetune(launcher, place, small / f"run{index}", plants=[("fill_disk", str(small), index)])
    assert run.wait() == [1, 1], run.texts()
    for rank in range(2):
        assert "No space left on device" in run.text(rank) and "Traceback" not in run.text(rank), run.texts()


@pytest.mark.parametrize(
    ("engine", "stage"), [("plain", 0), pytest.param("zero", 3, marks=[needs_zero, pytest.mark.torture])]
)
def test_each_file_of_a_checkpoint_that_cannot_be_written(launcher, tmp_path, engine, stage):
    """Files may not grow beyond a size (RLIMIT_FSIZE), needing no rights."""
    run = launcher.start("limited_files", str(tmp_path), engine, stage)
    assert run.wait() == [0, 0], run.texts()


def test_an_export_that_cannot_be_written_is_said_on_all_ranks(launcher, place):
    run = finetune(launcher, place, "export", plants=[("failing_export",)])
    assert run.wait() == [1, 1], run.texts()
    for rank in range(2):
        assert "could not save" in run.text(rank) and "File too large" in run.text(rank), run.texts()


def test_every_damage_to_a_checkpoint_is_found_on_all_ranks(launcher, tmp_path):
    run = launcher.start("damaged", str(tmp_path), "plain", 0, 3)
    assert run.wait() == [0, 0], run.texts()


@pytest.mark.torture
@needs_zero
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_much_damage_to_a_checkpoint_is_found_under_zero(launcher, tmp_path, stage):
    run = launcher.start("damaged", str(tmp_path), "zero", stage, 40)
    assert run.wait(240) == [0, 0], run.texts()


def test_a_damaged_checkpoint_gives_way_and_the_run_ends_the_same(launcher, place, undisturbed):
    """Also with one checkpoint kept: the damaged one, newer, must not push the good ones out."""
    whole, output = undisturbed(), place / "flipped"
    shutil.copytree(whole, output)
    run = finetune(launcher, place, "flipped-start", "--max-steps", "12")
    assert run.wait() == [0, 0]
    shutil.rmtree(output)
    shutil.move(place / "flipped-start", output)
    path = output / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    run = finetune(launcher, place, "flipped", "--checkpoint.keep-last", "1", "--max-steps", "11")
    assert run.wait() == [0, 0], run.texts()
    assert "optimizer.safetensors was altered" in run.text(0) and "trying the one before it" in run.text(0)
    assert "step-00000009" in run.text(0) and "removed step 12" in run.text(0)
    assert CheckpointStore(output / "checkpoints").steps()[0] == 11
    run = finetune(launcher, place, "flipped")
    assert run.wait() == [0, 0], run.texts()
    assert [line for line in curve(output) if line["step"] % 4 == 0 or line["kind"] == "validation"] == curve(whole)
    verify(CheckpointStore(output / "checkpoints").newest())


@pytest.mark.torture
@needs_zero
@pytest.mark.parametrize("name", ["memory", "optimizer", "model", "random-1"])
def test_a_damaged_twin_or_queue_gives_way(launcher, place, undisturbed, name):
    flags, output = ("--zero", "2"), place / f"twin-{name}"
    assert pretrain(launcher, place, output.name, *flags, "--max-steps", "12").wait() == [0, 0]
    path = output / "checkpoints" / "step-00000012" / f"{name}.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-7])
    run = pretrain(launcher, place, output.name, *flags)
    assert run.wait() == [0, 0], run.texts()
    assert f"{name}.safetensors has {len(raw) - 7} bytes" in run.text(0) and "step-00000009" in run.text(0)
    assert_same_run(undisturbed("zero2", command=pretrain), output)


# ---- data, and a rank's own misfortune ----


@pytest.fixture(scope="module")
def pair_data(place):
    for name in ("good", "bad"):
        pack_pairs(load_pairs(write_pairs(place / name, 12)), place / name / "packed")
    for path in (place / "bad" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    return place


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("worker", "ended by signal 9"),
        ("corrupt", "pairs cannot be used"),
        ("shard", "pairs cannot be used"),
    ],
)
def test_what_ends_one_ranks_data_is_said_on_all(launcher, pair_data, fault, words):
    run = launcher.start("pairs", str(pair_data), fault)
    assert run.wait() == [1, 1], run.texts()
    assert words in run.text(1) and "Traceback" not in run.text(1)
    assert f"rank 1 failed: {'decoding worker' if fault == 'worker' else ''}" in run.text(0) and words in run.text(0)


@pytest.mark.torture
@needs_zero
@pytest.mark.parametrize("whose", [0, 1])
def test_a_decoding_worker_of_a_rank_that_pretrains_is_killed(launcher, place, whose):
    flags = ("--zero", "2", "--data.processes", "true", "--schedule.total-steps", "500", "--validation.every", "0")
    run = pretrain(launcher, place, f"worker{whose}", *flags, plants=[("kill_worker", whose, 4)])
    assert run.wait() == [1, 1], run.texts()
    assert "ended by signal 9" in run.text(whose) and "Traceback" not in run.text(whose)
    assert f"rank {whose} failed: decoding worker" in run.text(1 - whose)


@pytest.mark.parametrize("whose", [0, 1])
def test_any_error_of_a_rank_is_said_by_the_others(launcher, place, whose):
    run = finetune(launcher, place, f"misfortune{whose}", plants=[("broken", whose, 6)])
    assert run.wait() == [1, 1], run.texts()
    assert f"miss finetune: rank {whose} failed: a rank's own misfortune" in run.text(1 - whose)
    assert "MemoryError" in run.text(whose)


@pytest.mark.parametrize("whose", [0, 1])
def test_an_error_of_one_rank_in_pretraining_s_validation(launcher, place, whose):
    """The other waits for its figures, and leaves with the reason."""
    flags = ("--max-steps", "2", "--validation.every", "1")
    run = pretrain(launcher, place, f"unsound{whose}", *flags, plants=[("broken_validation", whose)])
    assert run.wait() == [1, 1], run.texts()
    assert f"miss pretrain: rank {whose} failed: a rank's own misfortune" in run.text(1 - whose)


def test_images_that_only_the_first_rank_could_read(launcher, place):
    """Rank 0 reads first, the others wait at the door: its complaint is theirs."""
    write_data(place / "broken", broken=True)
    source = {"dataset": "jsonl", "root": str(place / "broken")}
    config = yaml.safe_load((place / "config.yaml").read_text())
    config["data"] |= {"train": [source], "validation": [], "cache": None}
    (place / "broken.yaml").write_text(yaml.safe_dump(config))
    words = ["finetune", "--config", str(place / "broken.yaml"), "--output", str(place / "unread")]
    run = launcher.start("command", words)
    assert run.wait() == [1, 1], run.texts()
    assert all("1 of 12 images cannot be read" in run.text(rank) for rank in range(2))


# ---- validation and the log ----


def test_validation_is_shared_out_and_the_same(launcher, place, undisturbed):
    """On one rank and on two the same figures of the same weights, each question answered once."""
    flags = ("--model.dropout", "0", "--max-steps", "1", "--validation.every", "1", "--data.questions-per-image", "1")
    run = finetune(launcher, place, "shared", *flags)
    assert run.wait() == [0, 0], run.texts()
    words = ["finetune", "--config", str(place / "config.yaml"), "--output", str(place / "alone"), *flags]
    run = launcher.start("command", words, world_size=1)
    assert run.wait() == [0], run.texts()
    two, one = ([x for x in curve(place / name) if x["kind"] == "validation"] for name in ("shared", "alone"))
    assert one == two and len(one) == 1


def test_a_torn_or_doubled_log_is_read_once(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 5.0), (2, 4.0), (1, 5.5), (2, 4.5))]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "log.jsonl").write_text(text[:60] + "\n" + text + '\n{"kind": "train", "st')
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path / "log.jsonl")] == [(1, 5.5), (2, 4.5)]
