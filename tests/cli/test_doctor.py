"""`miss doctor`: exit code 0 where answering works, else 1 with what to do."""

import importlib.util
import json

import pytest

from miss.cli import doctor, run
from miss.kernels import extension


def told(capsys, *flags: str) -> tuple[int, dict]:
    code = run(["doctor", "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def absent(monkeypatch, *modules: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in modules else find(name))


def test_here_it_answers(capsys):
    code, report = told(capsys)
    assert code == 0 and report["ok"] and report["problems"] == []
    assert report["answer"]["answers"] and report["answer"]["checkpoint"].endswith("miss-small")
    assert report["cpu_kernels"]["isa"] == extension.isa()
    assert {row["name"] for row in report["needed"]} == set(doctor.NEEDED)
    assert all(row["version"] for row in report["needed"])


def test_a_checkpoint_that_is_not_there(capsys, tmp_path):
    code, report = told(capsys, "--checkpoint", "miss-huge")
    assert code == 1 and not report["answer"]["answers"]
    assert "or one of: miss-small" in report["problems"][0]
    code, report = told(capsys, "--checkpoint", str(tmp_path))
    assert code == 1 and "config.json" in report["problems"][0]


def test_a_package_that_is_not_there(capsys, monkeypatch):
    absent(monkeypatch, "tokenizers", "torch")
    code, report = told(capsys)
    assert code == 1
    (problem,) = report["problems"]
    assert problem.startswith("not installed: torch, tokenizers; run `make answer`")
    assert "cpu_kernels" not in report, "what needs torch is not tried"


def test_an_optional_package_that_is_not_there(capsys, monkeypatch):
    absent(monkeypatch, "openjpeg")
    monkeypatch.setattr(
        doctor, "_answer", lambda *_: {"checkpoint": "c", "answers": True} | dict.fromkeys(SECONDS, 0.1)
    )
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "without pylibjpeg-openjpeg DICOM files in HTJ2K" in " ".join(out.split())
    assert out.endswith("`miss answer` works here\n")


SECONDS = ("load_seconds", "answer_seconds")


def test_kernels_that_are_not_built_are_no_problem(capsys, monkeypatch):
    reason = "the CPU kernels are not built (`miss doctor` says how)"
    monkeypatch.setattr(extension, "report", lambda: extension.Report("", [], [], [], None, reason))
    monkeypatch.setattr(
        doctor, "_answer", lambda *_: {"checkpoint": "c", "answers": True} | dict.fromkeys(SECONDS, 0.1)
    )
    assert run(["doctor"]) == 0
    assert "to build them: install a C++17 compiler" in capsys.readouterr().out


def test_a_wrong_instruction_set_is_a_problem(capsys, monkeypatch):
    def refuse():
        raise ValueError('MISS_CPU_ISA: got "neon"; this processor has avx2')

    monkeypatch.setattr(extension, "report", refuse)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert 'problem: MISS_CPU_ISA: got "neon"' in out and "does not work here" in out


@pytest.mark.parametrize("data", [None, "here"])
def test_data_are_no_condition(capsys, monkeypatch, tmp_path, data):
    from miss.engine.data import paths

    monkeypatch.setattr(paths, "BESIDE", tmp_path / "nothing")
    monkeypatch.delenv("MISS_DATA", raising=False)
    if data:
        monkeypatch.setenv("MISS_DATA", str(tmp_path))
    monkeypatch.setattr(
        doctor, "_answer", lambda *_: {"checkpoint": "c", "answers": True} | dict.fromkeys(SECONDS, 0.1)
    )
    code, report = told(capsys)
    assert code == 0 and report["data"]["reason"]
