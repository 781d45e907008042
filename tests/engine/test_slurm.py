"""`miss pretrain` under a real Slurm: srun's ranks, and the job script through a signal, a time limit, a killed rank.

Needs Slurm's and munge's daemons (Debian: slurm-wlm, munge); the cluster is this machine's, and ends with the tests.
"""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.engine.slurm_here import Cluster, what_is_missing
from tests.engine.test_rank_faults import assert_same_run, steps_done, until
from tests.engine.tiny_pairs import write_config, write_pairs, write_start

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain.sbatch"
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")  # a process on each of the script's two nodes
ONE_NODE = ("--nodes=1", "--ntasks-per-node=2")
ALL = "100000"  # steps: more than will be done

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(bool(what_is_missing()), reason=f"not installed: {', '.join(what_is_missing())}"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    made.environment.update(environment | {"PATH": path})
    yield made
    made.run("scancel", "--user", str(os.getuid()), check=False)
    made.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_start(folder / "start")
    write_pairs(folder / "pairs")
    write_config(folder, checkpoint={"every": 5}, schedule={"total_steps": 60, "warmup_steps": 5})
    return folder


@pytest.fixture(scope="module")
def whole(cluster, place):
    """60 steps that nothing happens to."""
    pretrain(cluster, place, "whole")
    return place / "whole"


def pretrain(cluster, place, output, *flags, nodes=1):
    words = ["--config", str(place / "config.yaml"), "--output", str(place / output), "--zero", "2", *flags]
    srun = [
        "srun",
        f"--nodes={nodes}",
        "--ntasks=2",
        "--kill-on-bad-exit=1",
        "python",
        "-m",
        "miss",
        "pretrain",
        *words,
    ]
    return cluster.run(*srun, cwd=ROOT, seconds=300)


class Job:
    """The job script with two processes, on two nodes if `options` do not say otherwise."""

    def __init__(self, cluster, place, output, *options, pairs="pairs", flags=()):
        self.cluster, self.output, self.log = cluster, place / output, place / f"{output}.txt"
        arguments = [place / "start", place / pairs, self.output, "--zero", "2", *flags]
        words = ["sbatch", "--parsable", *SMALL, f"--output={self.log}", *options, SCRIPT, *arguments]
        self.number = cluster.run(*map(str, words), cwd=ROOT, CONFIG=str(place / "config.yaml")).strip()

    def is_state(self, *states):
        return self.cluster.job(self.number)["JobState"] in states

    def wait(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.text()}\n{self.cluster.job(self.number)}"
            time.sleep(0.2)

    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def ends(self):
        """Waits for the job's end: its state."""
        self.wait(lambda: self.is_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        return self.cluster.job(self.number)["JobState"]


def ranks_of(output):
    """Process ids of `miss pretrain` with this output, those of srun and shells left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in words and words[1:3] == [b"-m", b"miss"]:
            found.append(int(entry.parent.name))
    return sorted(found)


@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_s_tasks_are_ranks(cluster, place, nodes):
    told = pretrain(cluster, place, f"on{nodes}", "--max-steps", "2", nodes=nodes)
    assert "ZeRO-2 on 2 processes" in told and "2 of 60 steps" in told
    assert told.count("step 2/60") == 1, "only rank 0 speaks"
    assert (place / f"on{nodes}" / "last" / "model.safetensors").is_file()


def test_two_runs_in_one_job_do_not_meet_each_other(cluster, place):
    """Both steps share the node at the same time."""
    words = f"python -m miss pretrain --config {place / 'config.yaml'} --max-steps 2 --output {place}/beside"
    steps = [f"srun --ntasks=2 --overlap {words}{n} &" for n in range(2)]
    script = " ".join([*steps, "wait"])
    told = cluster.run("salloc", "--quiet", "--nodes=1", "--ntasks=2", "bash", "-c", script, cwd=ROOT, seconds=300)
    assert told.count("plain PyTorch on 2 processes") == 2 and told.count("2 of 60 steps") == 2


@pytest.mark.parametrize("what", ["signal", "kill"])
def test_the_job_goes_back_into_the_queue_and_the_curve_is_the_same(cluster, place, whole, what):
    job = Job(cluster, place, what)
    job.wait(lambda: steps_done(job.output) >= 12)
    if what == "signal":
        cluster.run("scancel", "--signal=TERM", job.number)
    else:
        os.kill(ranks_of(job.output)[1], signal.SIGKILL)
    assert job.ends() == "COMPLETED", job.text()
    assert "back into the queue" in job.text() and job.text().count("going on from") == 1
    assert ("SIGTERM: saved" in job.text()) == (what == "signal")
    assert cluster.job(job.number)["Restarts"] == "1"
    assert_same_run(whole, job.output)


def test_the_time_limit_saves_and_the_job_goes_on(cluster, place):
    """Then `scancel` ends it for good, and is no loss either."""
    job = Job(cluster, place, "limit", *ONE_NODE, "--time=2", "--signal=TERM@45", flags=("--schedule.total-steps", ALL))
    job.wait(lambda: "going on from" in job.text(), 300)
    first = job.text()
    assert "SIGTERM: saved" in first and "ended with 143: back into the queue" in first
    before = steps_done(job.output)
    job.wait(lambda: steps_done(job.output) > before + 3)
    cluster.run("scancel", job.number)
    assert job.ends() == "CANCELLED"
    until(lambda: not ranks_of(job.output))
    assert job.text().count("SIGTERM: saved") == 2, job.text()


def test_a_run_that_cannot_go_on_is_not_started_again(cluster, place):
    (place / "bad").mkdir()
    (place / "bad" / "captions.jsonl").write_text("no pair\n")
    job = Job(cluster, place, "unread", pairs="bad")
    assert job.ends() == "FAILED"
    assert cluster.job(job.number)["ExitCode"].startswith("1:") and "back into" not in job.text()
