"""Who this process is by its launcher's variables; what the others do when one ends."""

import time

import pytest
import torch

from miss.engine.data.loader import GroupedLoader, GroupedSampler
from miss.engine.training.ranks import ALONE, LauncherError, Place, first_host, place_from
from tests.engine.test_zero import start
from tests.engine.tiny import RandomTokens, tiny_rows

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04,07],other9",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
}


def test_launchers():
    assert place_from({}) == Place()
    assert place_from(TORCHRUN) == Place(3, 4, 1)
    assert place_from(SRUN) == Place(5, 8, 1, ("gpu03", 20000 + (8 * 123456 + 1) % 12000))
    meet = {place_from({**SRUN, "SLURM_STEP_ID": str(step)}).meet for step in range(8)}
    assert len(meet) == 8, "steps of one job that run at the same time do not meet each other"
    assert place_from({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "7"}).meet == ("b", 7)
    assert place_from({**SRUN, **TORCHRUN}) == Place(3, 4, 1), "torchrun inside srun: torchrun's"
    batch_script = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_NUM_TASKS"}
    assert place_from(batch_script) == Place(), "a batch script itself is one process"
    assert [first_host(n) for n in ("a", "a,b", "a[1,3]", "a[01-04]", "x-y[7]b", "")] == [
        "a",
        "a",
        "a1",
        "a01",
        "x-y7",
        "127.0.0.1",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: got None; wanted a whole number"),
        ({"RANK": "x"}, "RANK: got 'x'"),
        ({"RANK": "4"}, "got rank 4"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set; wanted where 4 processes meet"),
    ],
)
def test_what_contradicts_itself_is_said(change, words):
    environment = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(LauncherError, match=words):
        place_from(environment)


def test_alone():
    rows = torch.ones(2, 3)
    assert ALONE.gather(rows)[0] is rows and ALONE.all_true(True) and not ALONE.all_true(False)
    assert ALONE.on_first(lambda: 3) == 3 and ALONE.broadcast_object("x") == "x"
    ALONE.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_shares_of_a_step_are_the_step(world_size, parts):
    """All ranks' parts one behind another are the whole step's images, whatever the number of ranks."""
    rows = tiny_rows()
    sampler = GroupedSampler([len(r) for r in rows], None, 7, 2, seed=5)
    whole = GroupedLoader(sampler, rows, RandomTokens(len(rows)))
    loaders = [
        GroupedLoader(sampler, rows, RandomTokens(len(rows)), parts, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for index in (0, 3):
        steps = [loader.build(index) for loader in loaders]
        asked = [qid for step in steps for part in step.parts for qid in part.qids]
        assert asked == whole.build(index).parts[0].qids
        assert {step.num_rows for step in steps} == {len(asked)}
        assert [step.first_part for step in steps] == [parts * r for r in range(world_size)]
    with pytest.raises(ValueError, match="wanted at least one for each of 4 parts on 2 ranks"):
        GroupedLoader(GroupedSampler([1], None, 7, 2, 0), rows, RandomTokens(1), 4, rank=0, world_size=2)


DYING = """
import os, sys, torch
from miss.engine.training.ranks import Ranks
with Ranks.from_environment("cpu", timeout=30) as ranks:
    ranks.barrier()
    if ranks.rank == 1:
        os.kill(os.getpid(), 9)
    try:
        while True:
            ranks.gather(torch.ones(1))
    except ValueError as error:
        print(error)
        sys.exit(3)
"""


def test_the_others_exit_when_one_is_killed():
    processes = start(2, ["-c", DYING])
    began = time.monotonic()
    output, _ = processes[0].communicate(timeout=60)
    processes[1].communicate(timeout=60)
    assert processes[0].returncode == 3 and processes[1].returncode == -9
    assert "rank 0 of 2: gathering rows failed" in output and "another rank ended" in output
    assert time.monotonic() - began < 30


def test_joining_alone_says_who_is_missing():
    code = "from miss.engine.training.ranks import Ranks; Ranks.from_environment('cpu', timeout=2)"
    process = start(2, ["-c", code])
    process[1].kill()
    output, _ = process[0].communicate(timeout=60)
    process[1].communicate(timeout=60)
    assert process[0].returncode and "joining failed" in output
