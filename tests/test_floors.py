"""The house: imports only go down, foreign packages come in by their own doors, nothing is unpickled.

miss -> engine -> models -> kernels; inside engine, serving -> runtime -> data, training -> data, evaluation -> data.
"""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["kernels", "models", "engine", "miss"]  # a floor imports itself and those before it
BARE = {"kernels", "models", "engine", "benchmarks"}  # names that other packages own: always said as miss.…
ROOMS = {  # inside engine/: what else a room may import
    "data": set(),
    "transcap": {"data"},
    "training": {"data"},
    "evaluation": {"data"},
    "runtime": {"data"},
    "serving": {"runtime", "data"},
}
BENCHES = ["miss/cli/bench.py", "miss/cli/profile.py"]  # they measure, or hold against measured ceilings
UNPICKLES = ["engine/training/zero.py"]  # its own run folder, whose manifest is verified first
DOORS = {  # a foreign package, and the only files that may import it
    "triton": [
        "kernels/*/triton_impl.py",
        "kernels/*/triton_*_impl.py",
        "kernels/offline.py",
        "kernels/triton_parts.py",
        "benchmarks/gpu/barrier.py",  # a ceiling, no operation: no model calls it, so it has no place in kernels/
    ],
    "flash_attn": ["kernels/attention/*_impl.py"],
    "flash_attn_interface": ["kernels/attention/*_impl.py"],
    "xformers": ["kernels/attention/*_impl.py"],
    "bitsandbytes": [
        "kernels/quant_linear/bitsandbytes_impl.py",
        "engine/training/lora.py",
        "engine/training/optimizer.py",  # its AdamW
    ],
    "deepspeed": ["engine/training/zero.py"],
    "httpx": ["engine/transcap/endpoint.py"],
    "fastapi": ["engine/serving/*.py", "benchmarks/peers/fastapi_server.py"],
    "starlette": ["engine/serving/*.py"],
    "uvicorn": ["engine/serving/*.py", "benchmarks/peers/fastapi_server.py"],
    "ray": ["engine/serving/ray_*.py"],
    "h11": ["engine/serving/remote.py"],
    "httptools": ["engine/serving/connection.py"],
    "pybase64": ["engine/serving/images.py"],
    "pydantic": ["engine/serving/*.py", "benchmarks/peers/fastapi_server.py"],
    "litserve": ["benchmarks/peers/litserve_server.py"],
    "aiohttp": ["benchmarks/serve_client.py"],
    "prometheus_client": ["engine/serving/*.py"],
    "transformers": ["engine/transcap/local.py", "benchmarks/*.py", "benchmarks/*/*.py"],
    **{name: UNPICKLES for name in ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")},
}
TORCH_LOAD = ["miss/cli/convert.py", *UNPICKLES]


def files() -> list[Path]:
    """Every source file of the floors and the benchmarks, not twice through the links in miss/."""
    found = [p for floor in (*FLOORS[:-1], "benchmarks") for p in (ROOT / floor).rglob("*.py")]
    return sorted([*found, *(ROOT / "miss").glob("*.py"), *(ROOT / "miss" / "cli").rglob("*.py")])


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(full name, whether inside a function) of everything a module imports, `import_module("…")` included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value), inside
        yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def aliases(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `from torch import load as read` gives read: torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def matches(here: PurePosixPath, patterns: list[str]) -> bool:
    return any(here.match(pattern) for pattern in patterns)


def upward(here: PurePosixPath, name: str, inside: bool) -> str | None:
    """Why a file may not import `name` of the project; None where it may."""
    floor, parts = here.parts[0], name.split(".")
    if parts[0] == "":
        return f"imports {name}: say the full name, miss.…"
    if parts[0] in BARE:
        return f"imports {name}: say miss.{name}"
    if parts[0] == "tests":
        return f"imports {name}: the floors know no tests"
    if parts[0] != "miss" or floor == "benchmarks":
        return None
    target = parts[1] if len(parts) > 1 and parts[1] in (*FLOORS, "benchmarks") else "miss"
    if target == "benchmarks":
        allowed = str(here) in BENCHES and inside
        return None if allowed else f"imports {name}: only {' and '.join(BENCHES)} may, inside a function"
    if FLOORS.index(target) > FLOORS.index(floor):
        return f"imports {name}, which stands above it"
    if floor == target == "engine":
        room, other = here.parts[1], parts[2] if len(parts) > 2 else ""
        if room not in ROOMS:
            return f"{room} is a new room: say in ROOMS what it may import"
        if other != room and other not in ROOMS[room]:
            return f"imports {name}: {room} may import {', '.join(sorted(ROOMS[room])) or 'no other room'}"
    if parts[-1].endswith("_impl") or (len(parts) > 1 and parts[-2].endswith("_impl")):
        # An operation's Triton files are loaded together: they may share what one of them holds.
        sibling = here.match("kernels/*/triton_*impl.py") and parts[2] == here.parts[1] and "triton_" in parts[3]
        if "torch_impl" not in parts and not inside and not sibling:
            return f"imports {name} when loaded: an implementation is imported when it is chosen, inside a function"
    return None


def unpickling(here: PurePosixPath, tree: ast.AST) -> Iterator[str]:
    """Calls that could run a file's code."""
    names = aliases(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = ast.unparse(node.func).partition(".")
        function = names.get(head, head) + ("." + rest if rest else "")
        keywords = {k.arg: k.value for k in node.keywords}
        if function in ("torch.load", "torch.serialization.load"):
            if not matches(here, TORCH_LOAD):
                yield f"calls {function}: only {' and '.join(TORCH_LOAD)} may; use safetensors"
            elif ast.unparse(keywords.get("weights_only", ast.Constant(None))) != "True" and not matches(
                here, UNPICKLES
            ):
                yield f"calls {function} without weights_only=True"
        if "allow_pickle" in keywords and ast.unparse(keywords["allow_pickle"]) != "False":
            yield f"calls {function} with allow_pickle"
        if function.endswith(".read_pickle"):
            yield f"calls {function}"


def violations(here: PurePosixPath, source: str) -> list[str]:
    """What is wrong with a file of this path and text; empty where nothing is."""
    tree = ast.parse(source)
    found = []
    for name, inside in imports(tree):
        top = name.split(".")[0]
        if top in DOORS and not matches(here, DOORS[top]):
            found.append(f"imports {top}; only {' and '.join(DOORS[top])} may")
        if reason := upward(here, name, inside):
            found.append(reason)
    return found + list(unpickling(here, tree))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_house_is_kept(path):
    here = PurePosixPath(path.relative_to(ROOT).as_posix())
    found = violations(here, path.read_text(encoding="utf-8"))
    assert not found, f"{here} " + f"\n{here} ".join(found)


@pytest.mark.parametrize("floor", ["kernels", "models", "engine", "benchmarks"])
def test_roots_of_the_floors(floor):
    """With an __init__.py there, `import kernels` at the root would find ours before the package of that name, which
    transformers imports. Folders below have one, so that they are installed."""
    assert not (ROOT / floor / "__init__.py").exists()
    assert (ROOT / "miss" / floor).resolve() == ROOT / floor and (ROOT / "miss" / floor).is_symlink()
    for folder in {p.parent for p in (ROOT / floor).rglob("*.py")} - {ROOT / floor}:
        assert (folder / "__init__.py").exists(), f"{folder.relative_to(ROOT)} has no __init__.py"


@pytest.mark.parametrize(
    ("here", "source", "says"),
    [
        ("kernels/gelu_mlp/op.py", "from miss.models.config import MissConfig", "stands above"),
        ("models/vqa.py", "import miss.engine.data.images", "stands above"),
        ("models/vqa.py", "def f():\n    from miss import Engine", "stands above"),
        ("engine/data/images.py", "from miss.cli import run", "stands above"),
        ("engine/runtime/engine.py", "from miss.engine.training.config import TrainConfig", "runtime may import data"),
        ("engine/training/trainer.py", "from miss.engine import runtime", "training may import data"),
        ("engine/evaluation/report.py", "from miss.engine.runtime.engine import Engine", "evaluation may import data"),
        ("engine/data/loader.py", "from miss.engine.training import config", "no other room"),
        ("engine/attic/box.py", "from miss.engine.data import images", "new room"),
        ("engine/data/images.py", "import engine.data", "say miss.engine.data"),
        ("kernels/gelu_mlp/op.py", "from . import reference", "full name"),
        ("kernels/gelu_mlp/op.py", "from tests.helpers import route", "no tests"),
        ("kernels/gelu_mlp/op.py", "from miss.kernels.gelu_mlp import triton_impl", "inside a function"),
        ("kernels/gelu_mlp/op.py", "from miss.kernels.gelu_mlp.cpu_impl import forward", "inside a function"),
        ("kernels/gelu_mlp/triton_impl.py", "from miss.kernels.linear.triton_impl import x", "inside a function"),
        ("kernels/gelu_mlp/triton_impl.py", "from miss.kernels.gelu_mlp.cpu_impl import x", "inside a function"),
        ("kernels/gelu_mlp/op.py", "import triton.language as tl", "imports triton"),
        ("kernels/gelu_mlp/torch_impl.py", "import flash_attn", "imports flash_attn"),
        ("benchmarks/gpu/machine.py", "import triton", "imports triton"),
        ("kernels/attention/op.py", "def f():\n    import xformers.ops", "imports xformers"),
        ("models/linear.py", "import bitsandbytes as bnb", "imports bitsandbytes"),
        ("engine/training/trainer.py", "import deepspeed", "imports deepspeed"),
        ("engine/runtime/engine.py", "from fastapi import FastAPI", "imports fastapi"),
        ("models/weights.py", "def f():\n    from transformers import AutoModel", "imports transformers"),
        ("models/weights.py", "import importlib\nimportlib.import_module('transformers')", "imports transformers"),
        ("engine/data/pack.py", "import pickle", "imports pickle"),
        ("models/weights.py", "import torch\ntorch.load(f, weights_only=True)", "use safetensors"),
        ("models/weights.py", "from torch import load as read\nread(f)", "use safetensors"),
        ("miss/cli/convert.py", "import torch as t\nt.load(f)", "without weights_only=True"),
        ("miss/cli/convert.py", "import torch\ntorch.load(f, weights_only=False)", "without weights_only=True"),
        ("engine/data/pack.py", "import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle"),
        ("miss/cli/answer.py", "from miss.benchmarks import harness", "only miss/cli/bench.py"),
        ("miss/cli/bench.py", "from miss.benchmarks import harness", "inside a function"),
        ("engine/data/pack.py", "def f():\n    import miss.benchmarks.harness", "only miss/cli/bench.py"),
    ],
)
def test_what_is_refused(here, source, says):
    found = violations(PurePosixPath(here), source)
    assert any(says in reason for reason in found), found


@pytest.mark.parametrize(
    ("here", "source"),
    [
        ("kernels/gelu_mlp/op.py", "from miss.kernels.gelu_mlp import reference, torch_impl"),
        ("kernels/gelu_mlp/op.py", "def f():\n    from miss.kernels.gelu_mlp import triton_impl"),
        ("kernels/gelu_mlp/triton_impl.py", "import triton"),
        ("kernels/offline.py", "import triton"),
        ("kernels/triton_parts.py", "import triton"),
        ("kernels/gelu_mlp/triton_backward_impl.py", "import triton\nfrom miss.kernels.gelu_mlp.triton_impl import x"),
        ("kernels/attention/flash_attn_impl.py", "import flash_attn"),
        ("engine/serving/app.py", "from miss.engine.runtime.engine import Engine\nimport fastapi"),
        ("engine/runtime/engine.py", "from miss.engine.data.images import decode_image\nfrom miss.models import vqa"),
        ("engine/training/zero.py", "import deepspeed, pickle, torch\ntorch.load(f)"),
        ("miss/cli/convert.py", "import torch\ntorch.load(f, weights_only=True)"),
        ("miss/cli/bench.py", "def f():\n    from miss.benchmarks import harness"),
        ("models/starting.py", "import safetensors.torch\nsafetensors.torch.load(f)"),
        ("benchmarks/gpu/barrier.py", "import triton"),
        ("benchmarks/bench_answer.py", "from miss.engine.runtime.engine import Engine\nimport transformers"),
    ],
)
def test_what_is_allowed(here, source):
    assert violations(PurePosixPath(here), source) == []
