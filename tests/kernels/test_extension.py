"""The compiled kernels: which instruction sets, which one runs, and what is said where they are not built.

What each kernel computes under each instruction set is test_isa.py's.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from miss.cli import run
from miss.kernels import extension, registry
from miss.kernels.registry import OPS, Impl, Op
from tests.helpers import ROOT, run_python

LADDER = ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"]
NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512f": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512vnni"},
    "avx512_bf16": {"avx512bf16"},
}
built = pytest.mark.skipif(isinstance(extension._module(), str), reason=str(extension._module()))
x86 = pytest.mark.skipif(platform.machine().lower() not in extension.X86, reason="not an x86-64 processor")


@pytest.fixture
def not_built(monkeypatch):
    """As if csrc/ had not been compiled."""
    reason = "the CPU kernels are not built (`miss doctor` says how)"
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_module", lambda: reason)
        caches = (extension.missing, registry._misfit)
        for cache in caches:
            cache.cache_clear()
        yield reason
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def toy():
    """An operation with a row of ours, a `torch` row and a reference: a + 1."""
    name = "toy_of_test_extension"
    yield Op(
        name,
        Impl("cpu", lambda a: a + 1, device="cpu", dtypes=frozenset({torch.float32}), needs=extension.missing),
        Impl("torch", lambda a: a + 1),
        Impl("reference", lambda a: a + 1),
    )
    del OPS[name]


@x86
def test_what_can_be_built_is_built():
    """Else every test of the kernels would skip itself, and nobody would know that they no longer compile."""
    pytest.importorskip("pybind11", reason="without pybind11 they cannot be built")
    if os.environ.get("MISS_BUILD_CSRC") == "0" or not (shutil.which("g++") or os.environ.get("CXX")):
        pytest.skip("no C++ compiler, or MISS_BUILD_CSRC=0")
    assert not isinstance(extension._module(), str), extension._module()


@built
def test_the_ladder():
    report = extension.report()
    assert report.built == LADDER
    assert report.supported == LADDER[: len(report.supported)], "each instruction set needs those before it"
    for isa in LADDER:
        assert (isa in report.supported) == all(
            NEEDS[below] <= set(report.features) for below in LADDER[: LADDER.index(isa) + 1]
        )
    assert report.reason is None and report.processor
    assert report.isa == (os.environ.get("MISS_CPU_ISA") or report.supported[-1])
    assert extension.missing() is None and extension.isa() == report.isa
    assert hasattr(extension.ops(), "ceiling_rate")


@built
def test_what_is_forced_and_absent_is_an_error_with_the_list():
    """One process: what MISS_CPU_ISA says is read again for as long as it is wrong."""
    code = """
import os, torch
from miss.cli import run
from miss.kernels import extension
for wrong in ("neon", "AVX2", "avx512", "avx2 ", "avx2,avx512f"):
    os.environ["MISS_CPU_ISA"] = wrong
    for ask in (extension.missing, extension.isa, extension.report, extension.ops):
        try:
            ask()
        except ValueError as error:
            assert f'MISS_CPU_ISA: got "{wrong}"; this processor has avx2' in str(error), error
        else:
            raise AssertionError(f"{wrong} was accepted by {ask}")
print([run(command) for command in (["explain", "--op", "layer_norm"], ["kernels", "list"])])
os.environ["MISS_CPU_ISA"] = ""
print(extension.isa())
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == extension.report().supported[-1], "empty is not set"
    exits = json.loads(lines[-2])
    if any(op.names[0] == "cpu" for op in OPS.values()):
        assert exits == [1, 1]
    assert exits[1] == 1 and 'MISS_CPU_ISA: got "avx2,avx512f"; this processor has avx2' in done.stderr


def test_not_built_says_so_and_torch_runs(toy, not_built):
    a = torch.ones(3)
    assert torch.equal(toy(a), a + 1) and toy.select(a).name == "torch"
    assert [reason for _, reason in toy.candidates(a)] == [not_built, None, None]
    assert extension.isa() is None
    assert extension.report() == extension.Report("", [], [], [], None, not_built)
    with pytest.raises(NotImplementedError, match="not built"):
        extension.ops()
    with registry.use(**{toy.name: "cpu"}), pytest.raises(NotImplementedError, match="not built"):
        toy(a)


def test_not_built_is_shown_for_every_row_of_ours(not_built, capsys):
    registry.load_all()
    for op in OPS.values():
        for impl, reason in op.here(torch.device("cpu"), torch.float32):
            assert impl.name != "cpu" or reason == not_built, op.name
    assert run(["explain", "--device", "cpu", "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)["ops"]
    assert all(choice["runs"] != "cpu" for choice in choices)


@built
def test_rows_of_ours_follow_the_tensor(toy):
    assert toy.select(torch.ones(2)).name == "cpu"
    assert toy.select(torch.ones(2).bfloat16()).name == "torch"
    rows = toy.here(torch.device("cpu"), torch.bfloat16)
    assert [reason for _, reason in rows] == ["does not take bfloat16", None, None]
    with registry.use(**{toy.name: "torch"}):
        assert toy.here(torch.device("cpu"), torch.float32)[0][1] == "not asked for: torch is forced"


def test_another_processor_is_named(monkeypatch):
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension.platform, "machine", lambda: "aarch64")
    assert extension._module.__wrapped__() == "the CPU kernels are written for x86-64, this is aarch64"


def test_a_module_that_does_not_load_is_named(monkeypatch):
    def fail(name):
        raise ImportError("undefined symbol: aoti_torch_of_tomorrow")

    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(extension.importlib, "import_module", fail)
    reason = extension._module.__wrapped__()
    assert "built again" in reason and "aoti_torch_of_tomorrow" in reason


def setup_file(monkeypatch) -> dict:
    """setup.py's names, without anything being set up."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_what_setup_says_before_it_builds(monkeypatch):
    names = setup_file(monkeypatch)
    monkeypatch.setenv("MISS_BUILD_CSRC", "0")
    assert names["missing"]() == "MISS_BUILD_CSRC=0"
    monkeypatch.delenv("MISS_BUILD_CSRC")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert names["missing"]() == "they are written for x86-64, this is aarch64"
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(names["importlib"].util, "find_spec", lambda name: None if name == "pybind11" else object())
    assert "pybind11 is not installed where this builds" in names["missing"]()


def test_every_instruction_set_has_its_file_and_its_flags(monkeypatch):
    flags = setup_file(monkeypatch)["INSTRUCTIONS"]
    assert list(flags) == LADDER
    for below, above in zip(LADDER, LADDER[1:], strict=False):
        assert set(flags[below]) < set(flags[above])
    for isa in LADDER:
        assert f"#define MISS_ISA {isa}\n" in (ROOT / "csrc" / "cpu" / f"{isa}.cpp").read_text()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """As much of the project as setup.py needs, beside an empty folder for a PATH without a compiler."""
    here = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "csrc", here / "csrc")
    (here / "empty").mkdir()
    return here


def build(tree: Path, value: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "MISS_BUILD_CSRC", "MISS_SANITIZE")}
    environment["PATH"] = str(tree / "empty")
    if value is not None:
        environment["MISS_BUILD_CSRC"] = value
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


@x86
@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        (None, 0, "installed without its CPU kernels, PyTorch's run instead: no C++17 compiler is found"),
        ("0", 0, "installed without its CPU kernels, PyTorch's run instead: MISS_BUILD_CSRC=0"),
        ("1", 1, "MISS_BUILD_CSRC=1, but the CPU kernels cannot be built: no C++17 compiler is found"),
    ],
)
def test_without_a_compiler(tree, value, code, says):
    pytest.importorskip("pybind11", reason="where pybind11 is missing, setup.py says that instead")
    done = build(tree, value)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert not list(tree.rglob("*.so"))


@x86
@pytest.mark.parametrize("age", [-10, 10])
def test_a_library_of_older_sources_does_not_outlive_a_failed_build(tree, age):
    pytest.importorskip("pybind11", reason="where pybind11 is missing, nothing is tried")
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    library = tree / "out" / "miss" / "kernels" / name
    library.parent.mkdir(parents=True, exist_ok=True)
    library.touch()
    changed = max(p.stat().st_mtime for p in (tree / "csrc").rglob("*"))
    changed = max(changed, (tree / "setup.py").stat().st_mtime)
    os.utime(library, (changed + age, changed + age))
    assert build(tree, None).returncode == 0
    assert library.exists() == (age > 0)
    library.unlink(missing_ok=True)
