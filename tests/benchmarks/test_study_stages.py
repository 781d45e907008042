"""The study's chain when a stage fails or a signal comes: one line, the stage's exit status, and the same command goes
on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miss.benchmarks.study_pretraining import LABELS
from miss.benchmarks.study_stages import StageEnded, Watch

ROOT = Path(__file__).resolve().parents[2]
SAVES = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
while True: time.sleep(0.01)
"""
CHAIN = """
import os, sys
from miss.benchmarks.study_stages import StageEnded, Watch
watch = Watch()
try:
    with watch.caught():
        watch.run("second", sys.argv[1:], dict(os.environ))
except StageEnded as error:
    print(error)
    sys.exit(error.exit_code)
"""


def begun(command, folder=ROOT):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def until_said(process, words):
    line = ""
    while words not in line:
        line = process.stdout.readline()
        assert line, "it ended without a word"


@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_stage_that_saves_is_waited_for(tmp_path, number, to_all):
    """The signal to the chain alone, or to all of a terminal's processes, as Ctrl-C is."""
    saved = tmp_path / "saved"
    process = begun([sys.executable, "-c", CHAIN, sys.executable, "-c", SAVES, str(saved)])
    until_said(process, "ready")
    (os.killpg if to_all else os.kill)(process.pid, number)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number and saved.read_text() == "saved"
    assert said.splitlines() == [
        f"stage second was ended by {number.name} (exit status {128 + number}); run the same command to go on"
    ]


@pytest.mark.parametrize("code, status, words", [(3, 3, "failed"), ("-9", 137, "was ended by SIGKILL")])
def test_a_stage_that_ends_by_itself(code, status, words):
    ends = "import os, sys; sys.exit(3)" if code == 3 else "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(StageEnded, match=f"stage first {words}.*exit status {status}") as found:
        Watch().run("first", [sys.executable, "-c", ends], dict(os.environ))
    assert found.value.exit_code == status


def test_a_signal_while_the_chain_works_itself_or_behind_a_stage():
    watch = Watch()
    with pytest.raises(StageEnded, match="stage start was ended by SIGTERM"), watch.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with pytest.raises(StageEnded, match="which is done"):
        watch.leave_if_asked()
    Watch().leave_if_asked()


def test_the_study_ends_in_one_line_and_goes_on(tmp_path):
    """The real chain at its first stage: killed as a batch system does, then the same command, which lacks labels."""
    command = [sys.executable, "-m", "miss.benchmarks.study_pretraining", "--smoke", "--until", "captions"]
    command += ["--start", str(tmp_path / "start"), "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    for file, _ in LABELS.values():
        (tmp_path / file).parent.mkdir(exist_ok=True)
    process = begun(command)
    until_said(process, "[captions] miss transcap")
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "Traceback" not in said
    last = "study_pretraining: stage captions was ended by SIGTERM (exit status 143); run the same command to go on"
    assert said.splitlines()[-1] == last
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.splitlines()[-1].startswith("study_pretraining: stage captions failed")
    assert "[captions]" in again.stdout and not (tmp_path / "out" / "done").exists()
    (tmp_path / "out" / "done").mkdir(parents=True)
    (tmp_path / "out" / "done" / "captions.json").write_text(json.dumps({"command": ["other"]}))
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert other.returncode == 1 and "other settings" in other.stderr and len(other.stderr.splitlines()) == 1
