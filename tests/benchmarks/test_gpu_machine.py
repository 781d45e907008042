"""The ceilings of a GPU on a make-believe one: every line runs, with tensors on the CPU and clocks for events.

What is shown is that names and arguments fit; no figure means anything, and the barrier is only compiled."""

import contextlib
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from miss.benchmarks import ceilings
from miss.benchmarks.gpu import machine
from tests.kernels.triton.device import INSTALLED


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on cuda are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {})}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Clock:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Clock") -> float:
        return max(1e-6, (end.at - self.at) * 1e3)


class Graph:
    replay = staticmethod(lambda: None)


@pytest.fixture
def pretended(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    about = SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 20, major=9, minor=0, total_memory=80 << 30)
    fakes = {
        "Event": Clock,
        "CUDAGraph": Graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda one: contextlib.nullcontext(),
        "graph": lambda one: contextlib.nullcontext(),
        "synchronize": lambda *device: None,
        "get_device_properties": lambda device: about,
        "get_device_capability": lambda *device: (9, 0),
        "get_device_name": lambda *device: "NVIDIA Make-believe",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(machine, "_NODES", 5)
    monkeypatch.setattr(machine, "_QUICK_SIDE", 64)
    monkeypatch.setattr(machine, "_QUICK_COPY", 1 << 16)
    monkeypatch.setattr(machine, "timed", lambda call, repeats=10, timed=machine.timed: timed(call, 2))
    with OnCpu():
        yield monkeypatch


def test_every_ceiling_but_the_barrier_runs(pretended):
    how: dict[str, str] = {}
    measures = machine._on_cuda(True, how)
    assert list(measures) == list(machine.NAMES)
    found = {name: machine._guarded(measure) for name, measure in measures.items() if name != "grid_barrier_us"}
    assert all(isinstance(value, float) for value in found.values()), found


def test_an_older_gpu_has_no_fp8_and_a_ceiling_that_fails_says_so(pretended):
    pretended.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
    found = machine._guarded(machine._on_cuda(True, {})["fp8_tflops"])
    assert found == "not measured: fp8 products need sm_89 or later"
    pretended.setattr(torch, "_int_mm", lambda a, b: (_ for _ in ()).throw(RuntimeError("CUBLAS_STATUS\n15")))
    assert machine._guarded(machine._on_cuda(True, {})["int8_tops"]) == "failed: RuntimeError: CUBLAS_STATUS 15"


def test_what_is_copied_is_no_longer_in_the_last_cache_when_it_is_copied_again(pretended):
    """Of a device whose cache is larger than what is copied otherwise."""
    sizes, cache = [], 3 << 20
    about = SimpleNamespace(L2_cache_size=cache)
    pretended.setattr(torch.cuda, "get_device_properties", lambda device: about)
    pretended.setattr(machine, "_copying", lambda nbytes: sizes.append(nbytes) or 1.0)
    pretended.setattr(machine, "_reading", lambda nbytes: sizes.append(nbytes) or 1.0)
    how: dict[str, str] = {}
    measures = machine._on_cuda(True, how)
    assert measures["copy_gbps"]() and measures["read_gbps"]() and min(sizes) >= 8 * cache
    assert how["copy_gbps"] == "(24 MiB; the last cache holds 3 MiB)"
    pretended.setattr(ceilings, "_BUFFER", 1 << 20)
    assert ceilings.Ceilings(torch.device("cuda"))._bytes >= 8 * cache


@pytest.mark.parametrize(
    ("slow", "refuses", "says"),
    [
        (False, None, "exact sums"),
        (True, None, "fast sums"),
        (None, False, "exact sums: no"),
        (None, True, "fast sums: no"),
    ],
)
def test_the_faster_way_of_fp8_products_is_the_ceiling(pretended, slow, refuses, says):
    """A planted library: one of the two ways takes longer, or is refused."""

    def product(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        if use_fast_accum is refuses:
            raise RuntimeError("no such product")
        time.sleep(0.01 if use_fast_accum is slow else 0.001)

    pretended.setattr(torch, "_scaled_mm", product)
    how: dict[str, str] = {}
    rate = machine._on_cuda(True, how)["fp8_tflops"]()
    assert says in how["fp8_tflops"] and rate > 2 * 64**3 / 0.005 / 1e12


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_the_barrier_is_compiled_once_for_all_numbers_of_rounds():
    """By Triton's own rule of what is compiled anew, in a process of its own: interpreted Triton has none."""
    code = (
        "import torch\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import make_backend\n"
        "from triton.runtime.jit import create_function_from_signature\n"
        "from miss.benchmarks.gpu.barrier import barriers\n"
        "backend = make_backend(GPUTarget('cuda', 90, 32))\n"
        "binder = create_function_from_signature(barriers.signature, barriers.params, backend)\n"
        "counter = torch.zeros(1, dtype=torch.int32)\n"
        "kinds = {str(binder(counter, p, r)[1]) for p in (1, 114, 132, 144) for r in (1, 4, 2000, 4000)}\n"
        "print(kinds)\n"
        "assert len(kinds) == 1\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr[-2000:]


def test_the_gpu_is_described(pretended):
    found = machine.environment(torch.device("cuda"))
    assert (found["gpu"], found["architecture"], found["multiprocessors"]) == ("NVIDIA Make-believe", "sm_90", 132)
    json.dumps(found)


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("arch", [80, 90])
def test_the_barrier_compiles_for_a_cooperative_launch(arch):
    """In a process of its own: interpreted Triton compiles nothing."""
    code = (
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        "import triton\n"
        "from miss.benchmarks.gpu.barrier import WARPS, barriers\n"
        "signature = {'counter': '*i32', 'PROGRAMS': 'i32', 'ROUNDS': 'i32'}\n"
        "source = ASTSource(fn=barriers, signature=signature, constexprs={}, attrs={})\n"
        f"target, options = GPUTarget('cuda', {arch}, 32), {{'num_warps': WARPS, 'launch_cooperative_grid': True}}\n"
        "made = triton.compile(source, target=target, options=options)\n"
        "assert made.metadata.launch_cooperative_grid\n"
        "print(made.asm['ptx'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "release" in made.stdout and "acquire" in made.stdout and "bar.sync" in made.stdout
