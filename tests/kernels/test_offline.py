"""Triton kernels compiled without a GPU: the committed report is complete, and what it says is found again.

Triton compiles in processes of their own, where nothing interprets it. What compiles is not shown to be right or fast.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from miss.cli import run
from miss.cli.kernels_compile import RENEW
from miss.kernels import compiled
from miss.kernels.compiled import ARCHS, Report, Row, judge, occupancy, table
from tests.kernels.triton.device import INSTALLED

SAMPLE = 8
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed: pip install 'miss-engine[triton]'")


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = (sys.executable, *command)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=175)


def compile_json(*flags: str) -> tuple[int, dict]:
    result = process("-m", "miss", "kernels", "compile", "--json", "--jobs", "2", *flags)
    assert result.stdout, result.stderr[-4000:]
    return result.returncode, json.loads(result.stdout)


@pytest.fixture(scope="module")
def checked() -> tuple[int, dict]:
    return compile_json("--check", "--only-changed", "--sample", str(SAMPLE))


@needs_triton
def test_the_report_is_complete(checked):
    changed = [" ".join(key) for key in checked[1]["changed"]]
    assert not changed, f"{len(changed)} kernels changed since {compiled.REPORT.name}: run `{RENEW}`, commit: {changed}"


@needs_triton
def test_what_changed_and_a_sample_are_as_reported(checked):
    code, told = checked
    assert not told["problems"] and code == 0, told["problems"]
    assert len(told["rows"]) >= SAMPLE and {row["arch"] for row in told["rows"]} == set(ARCHS)
    rows = compiled.load().rows
    if told["triton"] == told["report_triton"]:
        assert [row for row in told["rows"] if row != rows[row["op"], row["case"], row["arch"]].as_json()] == []


def test_the_committed_report():
    rows = compiled.load().rows.values()
    assert judge(rows, Report(), "") == []
    assert {row.arch for row in rows} == set(ARCHS)
    assert any("HGMMA" in row.tensor for row in rows) and any("HMMA" in row.tensor for row in rows)


@needs_triton
def test_a_worse_kernel_and_an_old_report_are_found(tmp_path):
    report, path = compiled.load(), tmp_path / "compiled.json"
    key = next(k for k, row in sorted(report.rows.items()) if row.default and k[0] == "ema")
    other = next(k for k in sorted(report.rows) if k[0] == "ema" and k != key)
    planted = replace(report.rows[key], hash="old", registers=8, tensor={"HGMMA": 4})
    report.rows |= {key: planted, ("ema", "gone", "sm_80"): replace(planted, case="gone")}
    del report.rows[other]
    report.save(path)
    code, told = compile_json("--only-changed", "--check", "--op", "ema", "--report", str(path))
    assert code == 1 and {tuple(k) for k in told["changed"]} == {key, other, ("ema", "gone", "sm_80")}
    assert len(told["rows"]) == 2
    if told["triton"] == report.triton:
        assert any("registers, 8 in the report" in p for p in told["problems"])
        assert any("has no HGMMA any more" in p for p in told["problems"])
    assert any(f"2 missing or old, 1 of no case: run `{RENEW}`" in p for p in told["problems"])
    assert compiled.load(path) == report, "--check writes nothing"
    if told["triton"] == report.triton:
        assert compile_json("--only-changed", "--op", "ema", "--report", str(path))[0] == 1, "it is worse, and written"
        assert compiled.load(path) == compiled.load()
        report.triton = "0.0"
        report.save(path)
        code, told = compile_json("--only-changed", "--op", "ema", "--report", str(path))
        assert code == 0 and "only spills are compared" in told["notes"][0] and compiled.load(path) == report


TOY = """
import triton
import triton.language as tl

from miss.kernels.launches import Case, Launch

SCALE = tl.constexpr(2.0)

@triton.jit
def scaled(x):
    return x * SCALE

@triton.jit
def kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, triton.cdiv(N, 1))
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, scaled(tl.dot(tl.load(a + at), tl.load(b + at))))

def on_the_host():
    return 1

def case(warps, **changed):
    names = {"a": "*bf16", "b": "*bf16", "c": "*fp32"}
    return Case("toy", str(warps), kernel, names, {"N": 128, **changed}, Launch({}, warps, 1), True, tuple(names))
"""
DRIVER = """
import importlib.util, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from miss.kernels import offline

def load(path):
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

toys = [load(path) for path in sys.argv[1:]]
case = toys[0].case
rows = [offline.compile_case(case(w), arch).as_json() for w, arch in ((1, "sm_80"), (8, "sm_80"), (4, "sm_90"))]
try:
    offline.compile_case(case(4, M=1), "sm_80")
except ValueError as error:
    refused = str(error)
hashes = [offline.fingerprint(toy.case(4)) for toy in toys]
sources = {}
offline._gather(case(4).kernel.fn, sources)
yielded = {"a": [case(4)], "b": [case(4), case(8)]}
offline.modules, offline._cases = lambda: list(yielded), yielded.get
found = [(f.module, f.case.name) for f in offline.find()]
yielded["b"][0] = case(4, N=64)
try:
    offline.find()
except ValueError as error:
    twice = str(error)
class Absent:  # a GPU: kernels that are asked to get ready for it are compiled
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))

driver.set_active(Absent())
said = []
with offline.compiling(said.append):
    for size in (16, 16, 32):
        toys[0].kernel.warmup(torch.bfloat16, torch.bfloat16, torch.float32, N=size, grid=(1,))
toys[0].kernel.warmup(torch.bfloat16, torch.bfloat16, torch.float32, N=64, grid=(1,))
told = {"said": said, "rows": rows, "refused": refused, "hashes": hashes, "warps": offline.fingerprint(case(8))}
print(json.dumps({**told, "found": found, "twice": twice, "sources": list(sources)}))
"""


@needs_triton
def test_a_toy_kernel(tmp_path):
    changes = [("", ""), ("return 1", "return 2"), ("x * SCALE", "x + SCALE"), ("(2.0)", "(3.0)"), ("* N +", "* N -")]
    files = []
    for i, (old, new) in enumerate(changes):
        files.append(tmp_path / f"toy{i}.py")
        files[-1].write_text(TOY.replace(old, new) if old else TOY)
    (tmp_path / "driver.py").write_text(DRIVER)
    result = process(str(tmp_path / "driver.py"), *map(str, files), PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    assert result.returncode == 0, result.stderr[-4000:]
    told = json.loads(result.stdout)
    one, eight, hopper = told["rows"]
    assert one["spill"] > 0 and one["warps"] == 1, "128 x 128 float32 sums in 32 threads"
    assert eight["spill"] == 0 and eight["tensor"].keys() == {"HMMA"} and 0 < eight["occupancy"] < 1
    assert hopper["tensor"].keys() == {"HGMMA"} and hopper["shared"] > 0
    assert told["refused"].endswith("do not agree on M")
    same, host, helper, constant, body = told["hashes"]
    assert same == host, "what runs on the host alone is not compiled"
    assert told["sources"] == ["toy.kernel", "toy.scaled", "toy: SCALE"], "not triton's own"
    assert told["found"] == [["a", "4"], ["b", "8"]], "a case that two modules yield is one"
    assert "b: a second case named toy 4" in told["twice"]
    assert len({same, helper, constant, body, told["warps"]}) == 5
    assert told["said"] == [True, False, True, False], "as each of two kernels begins and ends to be compiled"


@needs_triton
def test_interpreting_is_refused():
    result = process("-m", "miss", "kernels", "compile", TRITON_INTERPRET="1")
    assert result.returncode == 1 and "TRITON_INTERPRET is set" in result.stderr


ROW = Row("toy", "a", "sm_90", "0", True, 4, 100, 0, 1000, {"HGMMA": 16})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, None),
        ({"registers": 110}, None),
        ({"registers": 111}, "takes 111 registers, 100 in the report"),
        ({"registers": 111, "default": False}, None),
        ({"spill": 8}, "a default configuration spills 8 bytes"),
        ({"spill": 8, "default": False}, "spills 8 bytes a thread, 0 in the report"),
        ({"tensor": {"HMMA": 64}}, "has no HGMMA any more"),
        ({"tensor": {"HGMMA": 8}}, None),
        ({"shared": 228 * 1024}, "cannot be launched: 233,472 bytes of shared memory"),
        ({"warps": 16, "registers": 255}, "cannot be launched"),
    ],
)
def test_what_is_worse(changed, says):
    found = judge([replace(ROW, **changed)], Report("3.9.0", {ROW.key: ROW}), "3.9.0")
    assert (not found) if says is None else any(says in line for line in found)


def test_another_version_of_triton_is_held_to_spills_alone():
    report = Report("3.9.0", {ROW.key: ROW})
    assert judge([replace(ROW, registers=200, tensor={})], report, "3.7.1") == []
    assert len(judge([replace(ROW, spill=8)], report, "3.7.1")) == 1


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "warps_at_once"),
    [
        ("sm_80", 4, 32, 0, 64),
        ("sm_80", 4, 255, 0, 8),  # 8,192 registers a warp
        ("sm_80", 4, 168, 0, 12),  # 5,376 a warp: twelve, three to a scheduler
        ("sm_80", 1, 32, 0, 32),  # 32 blocks
        ("sm_90", 8, 128, 113 * 1024, 16),  # two blocks, with the system's 1 KiB each
        ("sm_90", 8, 128, 113 * 1024 + 1, 8),
        ("sm_80", 8, 128, 163 * 1024, 8),
        ("sm_80", 8, 128, 163 * 1024 + 1, 0),
        ("sm_89", 4, 40, 0, 48),
    ],
)
def test_occupancy(arch, warps, registers, shared, warps_at_once):
    assert occupancy(arch, warps, registers, shared) == warps_at_once / compiled.LIMITS[arch].warps


def test_the_table_begins_with_the_worst():
    rows = [ROW, replace(ROW, case="b", registers=255), replace(ROW, case="c", spill=8, default=False)]
    lines = table(rows, Report("", {ROW.key: replace(ROW, registers=90)}))
    assert [line.split()[1] for line in lines[1:4]] == ["c*", "b", "a"]
    assert "was spill 0, regs 90" in lines[3] and "16 HGMMA" in lines[3]
    assert "… and 2 more" in table(rows, Report(), 1)[2]


def test_the_report_is_read_as_it_was_written(tmp_path):
    path, report = tmp_path / "compiled.json", Report("3.9.0", {ROW.key: ROW})
    assert compiled.load(path) == Report()
    report.save(path)
    assert compiled.load(path) == report and len(path.read_text().splitlines()) == 3
    path.write_text('{"rows": [{}]}')
    with pytest.raises(ValueError, match="not a report of compiled kernels"):
        compiled.load(path)


def test_the_command_line(capsys, tmp_path):
    assert run(["kernels", "compile", "--arch", "sm_80,sm_75"]) == 1
    assert "--arch sm_75: unknown; known: sm_80" in capsys.readouterr().err
    assert run(["kernels", "report", "--arch", "sm_90", "--op", "ema", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "sm_80" not in out and "ema" in out and "does not show" in out
    assert run(["kernels", "report", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == [row.as_json() for row in compiled.load().rows.values()]
    assert run(["kernels", "report", "--op", "emma"]) == 1
    assert "did you mean ema?" in capsys.readouterr().err
    assert run(["kernels", "report", "--report", str(tmp_path / "none.json")]) == 1
    assert "`miss kernels compile` writes it" in capsys.readouterr().err
