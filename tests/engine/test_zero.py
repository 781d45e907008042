"""DeepSpeed's ZeRO 0 to 3 on one and two gloo ranks: plain PyTorch's losses and weights, exact and elastic resume.

Three process groups run all cases (`zero_worker.py`): DeepSpeed's import takes longer than most of them.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EVERYWHERE = ["together", "vqa_parity", "vqa_resume", "vqa_nan"]
CASES = {
    "one": [*EVERYWHERE, "pretrain_parity", "twin_1000", "presets"],
    "two": [*EVERYWHERE, "vqa_elastic", "pretrain_parity", "pretrain_recomputed", "twin_1000"],
    "one again": ["vqa_elastic"],
}
OFTEN = {"one": ["vqa_parity", "vqa_halves"], "two": ["vqa_halves", "pretrain_resume"]}
if importlib.util.find_spec("bitsandbytes") is not None:
    OFTEN["two"].append("vqa_eight_bit")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")


def environment_of(rank, world_size, port):
    """As torchrun sets it."""
    places = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return {
        **kept,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **{k: str(v) for k, v in places.items()},
    }


def start(world_size, arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *(a.replace("RANK", str(rank)) for a in arguments)],
            cwd=ROOT,
            env=environment_of(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_all(place, groups):
    """Every case's result by (group, rank, case)."""
    found = {}
    for name, cases in groups.items():
        world_size = 2 if name == "two" else 1
        arguments = ["-m", "tests.engine.zero_worker", str(place), str(place / f"{name}-RANK.json"), *cases]
        processes = start(world_size, arguments)
        with ThreadPoolExecutor(2) as pool:  # both at once: a process whose output nobody reads stands still
            output = list(pool.map(lambda process: process.communicate(timeout=300)[0], processes))
        for rank in range(world_size):
            path = place / f"{name}-{rank}.json"
            held = json.loads(path.read_text()) if path.exists() else {}
            for case in cases:
                found[name, rank, case] = held.get(case, {"failure": f"never came to it:\n{output[rank][-3000:]}"})
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("zero")
    return place, run_all(place, CASES)


@pytest.mark.torture
def test_halves_resume_and_8_bit(tmp_path):
    failures = {key: result["failure"] for key, result in run_all(tmp_path, OFTEN).items()}
    assert not any(failures.values()), failures


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_case(results, name, case):
    _, found = results
    for rank in range(2 if name == "two" else 1):
        result = found[name, rank, case]
        assert result["failure"] is None, f"rank {rank}: {result['failure']}"


def test_every_stage_exports_our_names(results):
    """The whole weights of a run on two ranks load strictly into a model on its own, and encoder and decoder of the
    pretraining model still share what they share."""
    from miss.models.pretrain import MissPretrain
    from miss.models.pretrain_weights import load_pretraining, saved_pretraining
    from tests.models.test_pretrain import OBJECTIVE, pretrain_config

    place, _ = results
    first = load_file(place / "export0.safetensors")
    for stage in range(4):
        tensors = load_file(place / f"export{stage}.safetensors")
        model = MissPretrain(pretrain_config(), OBJECTIVE)
        assert not load_pretraining(model, tensors).missing
        assert saved_pretraining(model, memory=False).keys() == tensors.keys() == first.keys()
        assert not [
            n for n in tensors if n.startswith("decoder.embeddings") or ".mlp." in n and n.startswith("decoder")
        ]
        assert model.decoder.layers[0].mlp is model.encoder.layers[0].mlp
        assert all(torch.allclose(t, first[n], atol=5e-6) for n, t in tensors.items())
