"""The suite's driver under faults: parts that hang, crash or are killed; results too large to travel; and the whole
script on a CPU, in a Python as bare as a GPU machine's. What is measured on CUDA is not shown: no GPU ran it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from miss.benchmarks.gpu import collect, jobs, pack, process, state, suite, work
from miss.benchmarks.gpu.jobs import Board, Job
from miss.benchmarks.gpu.plan import Plan
from miss.benchmarks.gpu.suite import Part

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).with_name("bare")
GOOD = "print('well')"
CRASH = "import os; print('last words', flush=True); os.abort()"
# Deaf to a polite end, with a child that has left its group; says the child's number.
HANG = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], process_group=0); "
    "print('child', child.pid, flush=True); time.sleep(300)"
)


def part(name: str, code: str, weight: float = 1.0) -> Part:
    return Part(name, name, weight, lambda plan: [sys.executable, "-c", code])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def drive(tmp_path, monkeypatch, capsys):
    """Runs the driver on parts of our making -> (exit code, state, what was said)."""
    monkeypatch.setattr(suite, "_probe", lambda plan: {"processor": "toy", "torch": "0"})
    monkeypatch.setattr(suite, "_ENDING", 0.0)
    monkeypatch.setattr(suite, "_LEAST", 0.3)
    monkeypatch.setattr(process, "_GRACE", 0.3)

    def run(*parts: Part, seconds: float = 60.0, flags: tuple[str, ...] = ()):
        folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        argv = ["--device", "cpu", "--minutes", str(seconds / 60), *folders, "--json", *flags]
        code = suite.main(argv, parts)
        path = tmp_path / "out" / state.NAME
        said = capsys.readouterr()
        return code, json.loads(path.read_text()) if path.exists() else {}, said.out + said.err

    return run


def test_all_parts_run_and_the_last_line_is_a_summary(drive):
    code, found, said = drive(part("one", GOOD), part("two", GOOD))
    assert code == 0 and [p["status"] for p in found["parts"].values()] == ["done", "done"]
    summary = json.loads(said.strip().splitlines()[-1])
    assert summary["parts"] == {"one": "done", "two": "done"} and summary["failed"] == []
    assert "[1/2] one" in said and "s left" in said


def test_a_crash_is_recorded_with_its_last_words_and_the_next_part_runs(drive):
    code, found, said = drive(part("bad", CRASH), part("good", GOOD))
    assert code == 1 and found["parts"]["good"]["status"] == "done"
    assert found["parts"]["bad"]["status"] == "failed" and found["parts"]["bad"]["exit_code"] == -signal.SIGABRT
    assert "last words" in found["parts"]["bad"]["tail"] and "did not: bad (failed)" in said


def test_a_part_that_hangs_is_ended_at_its_limit_with_its_children(drive):
    start = time.monotonic()
    code, found, _ = drive(part("bad", HANG), part("good", GOOD), seconds=4.0)
    assert code == 1 and time.monotonic() - start < 8
    assert found["parts"]["bad"]["status"] == "hung" and found["parts"]["good"]["status"] == "done"
    child = int(found["parts"]["bad"]["tail"].split("child ")[-1].split()[0])
    assert not alive(child)


def test_what_is_left_of_the_time_is_shared(drive):
    _, found, _ = drive(part("one", GOOD, 3.0), part("two", GOOD, 1.0), part("three", GOOD, 1.0), seconds=50.0)
    limits = {name: p["limit"] for name, p in found["parts"].items()}
    assert 28 < limits["one"] < 30.1 and 24 < limits["two"] < 25.1 and 48 < limits["three"] < 50.1


def test_no_time_left_is_said_and_is_no_success(drive):
    code, found, _ = drive(part("slow", "import time; time.sleep(1.2)"), part("late", GOOD, 0.0001), seconds=1.4)
    assert code == 1 and found["parts"]["slow"]["status"] == "done" and found["parts"]["late"]["status"] == "skipped"


def test_a_second_run_leaves_alone_what_is_done_and_repeats_what_failed(drive, tmp_path):
    seen, ready = tmp_path / "seen", tmp_path / "ready"
    once = part("once", f"open({str(seen)!r}, 'a').write('x')")
    later = part("later", f"import pathlib, sys; sys.exit(not pathlib.Path({str(ready)!r}).exists())")
    assert drive(once, later)[0] == 1
    ready.touch()
    code, found, said = drive(once, later)
    assert code == 0 and seen.read_text() == "x" and "once: done before" in said
    assert found["parts"]["later"]["status"] == "done"
    assert drive(once, later, flags=("--again",))[0] == 0 and seen.read_text() == "xx"


def test_results_of_other_sources_are_not_mixed(drive, monkeypatch):
    assert drive(part("one", GOOD))[0] == 0
    monkeypatch.setattr(state, "source_hash", lambda: "0" * 16)
    code, found, said = drive(part("one", GOOD))
    assert code == 2 and "other sources" in said and found["parts"]["one"]["status"] == "done"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 9, "parts": {}}', '{"format": 1, "parts": 3}']
)
def test_a_damaged_state_is_one_line_and_is_left_as_it_is(drive, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / state.NAME).write_text(text)
    with pytest.raises(ValueError):
        state.read(tmp_path / "out" / state.NAME)
    assert suite.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w")], ()) == 2
    assert (tmp_path / "out" / state.NAME).read_text() == text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_midway_goes_on_where_it_was(tmp_path, how):
    seen, waits = tmp_path / "seen", tmp_path / "waits"
    waits.touch()
    slow = (
        f"import pathlib, time\nprint('here', flush=True)\nwhile pathlib.Path({str(waits)!r}).exists(): time.sleep(0.1)"
    )
    script = tmp_path / "drive.py"
    script.write_text(
        "import sys\nfrom miss.benchmarks.gpu import suite\n"
        "suite._probe = lambda plan: {'processor': 'toy'}\n"
        "part = lambda name, code: suite.Part(name, name, 1.0, lambda plan: [sys.executable, '-c', code])\n"
        f"parts = (part('first', \"open({str(seen)!r}, 'a').write('x')\"), part('second', {slow!r}))\n"
        "sys.exit(suite.main(sys.argv[1:], parts))\n"
    )
    command = [sys.executable, str(script), "--device", "cpu", "--minutes", "1"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    log = tmp_path / "work" / "logs" / "second.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and "here" in log.read_text().splitlines()):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(how)
    assert driver.wait(10) == (143 if how == signal.SIGTERM else -signal.SIGKILL)
    found = json.loads((tmp_path / "out" / state.NAME).read_text())
    assert found["parts"]["first"]["status"] == "done" and found["parts"]["second"]["status"] == "running"
    waits.unlink()
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode == 0
    found = json.loads((tmp_path / "out" / state.NAME).read_text())
    assert found["parts"]["second"]["status"] == "done" and seen.read_text() == "x"


def test_a_part_that_can_go_on_is_started_again_while_there_is_time(drive, tmp_path):
    """As tuning asks for where its device is lost (exit code 75)."""
    seen = tmp_path / "seen"
    add = f"import pathlib, sys; path = pathlib.Path({str(seen)!r}); path.open('a').write('x')\n"
    code, found, _ = drive(part("tune", add + "sys.exit(75 * (len(path.read_text()) < 3))"), part("next", GOOD))
    assert code == 0 and seen.read_text() == "xxx" and found["parts"]["tune"]["status"] == "done"
    slow = add + "import time; time.sleep(1.0); sys.exit(75)"
    code, found, _ = drive(part("slow", slow), seconds=1.2)
    assert code == 0 and found["parts"]["slow"]["status"] == "partial" and seen.read_text() == "xxxx"


def test_what_a_part_had_written_when_the_driver_was_killed_is_gone_on_with(drive, tmp_path):
    ready = tmp_path / "work" / "part.json"
    code = f"import json, pathlib, sys; path = pathlib.Path({str(ready)!r}); n = json.loads(path.read_text())['n']\n"
    code += "path.write_text(json.dumps({'n': n + 1}))"
    assert drive(part("part", f"open({str(ready)!r}, 'w').write('{{\"n\": 1}}'); sys.exit(1)"))[0] == 1
    ready.write_text('{"n": 5}')
    path = tmp_path / "out" / state.NAME
    for status, wanted in (("failed", 2), ("running", 6)):
        content = json.loads(path.read_text())
        content["parts"]["part"] |= {"status": status, "result": {"n": 1}}
        path.write_text(json.dumps(content))
        ready.write_text('{"n": 5}')
        assert drive(part("part", code))[1]["parts"]["part"]["result"] == {"n": wanted}


def test_an_earlier_runs_results_are_gone_on_from(drive, tmp_path):
    assert drive(part("one", GOOD), part("two", CRASH))[0] == 1
    (tmp_path / "out").rename(tmp_path / "home")
    code, found, said = drive(part("one", GOOD), part("two", GOOD), flags=("--go-on-from", str(tmp_path / "home")))
    assert code == 0 and "one: done before" in said and found["parts"]["two"]["status"] == "done"
    with tarfile.open(tmp_path / "out" / collect.LOGS) as archive:
        assert {"one.log", "two.log"} <= set(archive.getnames())


# --- A part made of several commands


def plan_of(tmp_path: Path, seconds: float = 30.0) -> Plan:
    for name in ("out", "work/logs"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    return Plan("cpu", True, tmp_path / "out", tmp_path / "work", seconds)


def job(name: str, code: str, **more) -> Job:
    return Job(name, lambda seconds: [sys.executable, "-c", code], **more)


def test_jobs_go_on_after_a_crash_and_a_hang_and_a_second_run_repeats_only_those(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_GRACE", 0.3)
    monkeypatch.setattr(jobs, "_LEAST", 0.5)
    board = tmp_path / "board.json"
    several = [
        job("crash", CRASH),
        job("hang", HANG, weight=0.02),
        job("good", "print('{\"n\": 1}')"),
        job("fine", "print(2); exit(5)", fine=(5,)),
    ]
    assert jobs.run_all(several, plan_of(tmp_path), Board(board), "toy") == ["crash", "hang"]
    found = json.loads(board.read_text())
    assert found["complete"] and {n: j["status"] for n, j in found["jobs"].items()} == {
        "crash": "failed", "hang": "hung", "good": "done", "fine": "done",
    }  # fmt: skip
    assert found["jobs"]["good"]["result"] == {"n": 1} and "last words" in found["jobs"]["crash"]["tail"]
    assert not alive(int(found["jobs"]["hang"]["tail"].split("child ")[-1].split()[0]))
    again = [job("good", "raise SystemExit('not again')"), job("crash", GOOD), job("hang", GOOD)]
    assert jobs.run_all(again, plan_of(tmp_path), Board(board), "toy") == []


def test_jobs_for_which_no_time_is_left_leave_the_part_unfinished(tmp_path):
    board = tmp_path / "board.json"
    assert (
        jobs.run_all([job("late", GOOD)], plan_of(tmp_path, 0.0), Board(board), "toy") == []
    )  # not wrong: the part is `partial`
    assert not json.loads(board.read_text())["complete"]


def test_a_command_that_falls_over_with_a_fine_code_is_not_done(tmp_path):
    """Python's own code for an exception is 1, as that of a benchmark that found something wrong."""
    fallen = job("fallen", "raise SystemExit(1)", fine=(1,), read=lambda log: None)
    told = job("told", "raise SystemExit(1)", fine=(1,), read=lambda log: {"rows": 1})
    assert jobs.run_all([fallen, told], plan_of(tmp_path, 60.0), Board(tmp_path / "board.json"), "toy") == ["fallen"]


def test_what_tests_said_is_counted_also_where_they_were_ended_midway():
    log = (
        "tests/a/test_x.py::test_one PASSED  [ 1%]\ntests/a/test_x.py::test_two[a b] FAILED\ntests/a/test_x.py::test_th"
    )
    assert work.outcomes(log) == {"passed": 1, "failed": 1, "not_passed": ["tests/a/test_x.py::test_two[a b]"]}


def test_every_operation_with_a_benchmark_has_its_place_and_the_aims_are_known():
    from miss.benchmarks import suite as benchmarks
    from miss.benchmarks.gpu import aims

    named = {name: aimed for name, _, aimed in work.KERNELS}
    on_cpu_alone = {"decoder_step", "encoder_layer"}  # on a GPU they are single operations
    assert set(benchmarks.folders()) - on_cpu_alone == set(named)
    assert {name for name, aimed in named.items() if aimed} == set(aims._CASES)
    assert (work._AIMS, work._TINY) == (aims.NAME, aims.TINY)


def test_the_parts_on_a_gpu_name_files_and_commands_that_exist(tmp_path):
    plan = Plan("cuda", False, tmp_path, tmp_path / "work", 100.0)
    names = {one.name for one in work.tests(plan)[0]}
    assert {"test_attention", "test_cross_entropy", "test_devices"} <= names
    for make in work.PARTS.values():
        several, parallel = make(plan)
        assert parallel >= 1 and len({one.name for one in several}) == len(several)
        assert all(one.command(10.0)[:2] == [sys.executable, "-m"] for one in several)
    assert all("--go-on" in one.resume for one in work.kernels(plan)[0] if one.name != "memory")
    compiled = [one for one in work.answers(plan)[0] if any("compiled" in word for word in one.command(10.0))]
    assert [one.name for one in compiled] == ["b1-compiled"] and "hf-bf16" not in compiled[0].command(10.0)
    alone = [one.command(10.0) for one in work.answers(plan)[0] if one.name.startswith("b1")]
    peers = [words[words.index("--peers") + 1 : words.index("--out")] for words in alone]
    assert len(alone) == 5 and all(len(names) == 1 for names in peers), "none takes another's results along"


# --- What travels


def test_what_is_too_large_is_shortened_compressed_or_left_out(tmp_path):
    logs = [tmp_path / name for name in ("a.log", "b.log")]
    for i, path in enumerate(logs):
        path.write_bytes(b"begin" + os.urandom(300_000) + b"end%d" % i)
    said = pack.tar(tmp_path / "logs.tar.gz", logs, 50_000)
    assert (tmp_path / "logs.tar.gz").stat().st_size <= 50_000 and "first and last" in said[0]
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        kept = archive.extractfile("b.log").read()
    assert kept.startswith(b"begin") and kept.endswith(b"end1") and b"left out" in kept
    traces = [tmp_path / "big.json", tmp_path / "little.json"]
    traces[0].write_bytes(os.urandom(80_000))
    traces[1].write_bytes(b"{}")
    assert "big.json left out" in pack.tar(tmp_path / "traces.tar.gz", traces, 50_000)[0]
    with tarfile.open(tmp_path / "traces.tar.gz") as archive:
        assert archive.getnames() == ["little.json"]


def test_the_limit_holds_for_our_files_and_others_are_nobodys_to_touch(tmp_path):
    (tmp_path / "kernels-cuda.jsonl").write_text("{}\n" * 30_000)
    (tmp_path / "evidence.json").write_bytes(os.urandom(60_000).hex().encode())
    (tmp_path / "mine.bin").write_bytes(bytes(90_000))
    said = pack.fit(tmp_path, ("kernels-*.jsonl", "evidence.json"), 50_000)
    assert {p.name for p in tmp_path.iterdir()} == {"kernels-cuda.jsonl.gz", "mine.bin"}
    assert any("evidence.json.gz: left out" in text for text in said)
    assert pack.text_of(tmp_path / "kernels-cuda.jsonl") == "{}\n" * 30_000
    for i in range(8):
        (tmp_path / f"other-{i}").touch()
    assert "10 files" in pack.fit(tmp_path, ())[0]


def test_rows_of_several_runs_are_one_file_and_half_a_line_is_dropped(tmp_path):
    plan = plan_of(tmp_path)
    row = {"record": "row", "op": "x", "implementation": "a", "shape": "1", "dtype": "f", "cache": "warm"}
    plan.kernels.write_text(json.dumps(row | {"median_ms": 1}) + "\n" + json.dumps(row | {"shape": "2"}) + "\n")
    (plan.work / "bench" / "x").mkdir(parents=True)
    new = [{"record": "environment"}, row | {"median_ms": 2}]
    (plan.work / "bench" / "x" / "kernels-cpu.jsonl").write_text("\n".join(map(json.dumps, new)) + '\n{"record": "ro')
    collect.pack_all(plan)
    found = [json.loads(line) for line in plan.kernels.read_text().splitlines()]
    assert found[0] == {"record": "environment"} and len(found) == 3
    assert next(line for line in found if line.get("shape") == "1")["median_ms"] == 2


def test_answers_of_several_commands_are_one_result_and_half_a_file_is_dropped(tmp_path):
    plan, label = plan_of(tmp_path), "base-384px-b1-q1-t4"

    def result(**ms):
        rows = {name.replace("_", "-"): {"ms": {"median": value}} for name, value in ms.items()}
        return json.dumps({"setting": {"label": label}, "rows": rows, "ratios": dict.fromkeys(rows), "failed": {}})

    files = {"b1": result(miss=1.0, hf=9.0), "b1-compiled": result(miss=1.1, hf_compiled=3.0), "b32": '{"setting":'}
    for name, text in files.items():
        (plan.work / "answers" / name).mkdir(parents=True)
        (plan.work / "answers" / name / f"answer-{label}.json").write_text(text)
    collect.pack_all(plan)
    found = json.loads((plan.out / "answers.json").read_text())[label]
    assert {name: row["ms"]["median"] for name, row in found["rows"].items()} == {
        "miss": 1.0, "hf": 9.0, "hf-compiled": 3.0,
    }  # fmt: skip
    assert set(found["ratios"]) == set(found["rows"])


def test_evidence_that_ran_out_of_time_is_gone_on_with(tmp_path):
    plan = plan_of(tmp_path)
    plan.evidence.write_text('{"format": 1, "records": []}')
    first, then = "$ miss kernels validate\nthe time is over before …\n", "\n$ miss kernels validate\n1 measured\n"
    (plan.logs / "evidence.log").write_text(first)
    assert not collect.result_of("evidence", plan)["complete"]
    (plan.logs / "evidence.log").write_text(first + then)
    assert collect.result_of("evidence", plan)["complete"]


def test_a_work_folder_of_somebody_else_is_not_emptied(tmp_path):
    plan = plan_of(tmp_path)
    (plan.work / "thesis.tex").touch()
    with pytest.raises(ValueError, match="something else"):
        collect.begin(plan, "key")
    assert (plan.work / "thesis.tex").exists()


# --- The whole script


def bare_copy(folder: Path) -> Path:
    """The tree as it travels: without git, without what was built; links as links."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results", ".*")
    for name in ("miss", "kernels", "models", "engine", "benchmarks", "tests", "checkpoints", "examples"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="ends processes by /proc")
def test_the_whole_script_on_a_cpu_with_what_a_gpu_machine_has(tmp_path):
    """No git, no extension, no tyro, pydicom, matplotlib …: every part's command really runs; again, and it is done."""
    root = bare_copy(tmp_path / "tree")
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(BARE), "OUT": str(tmp_path / "out")}
    command = ["bash", str(root / "benchmarks" / "gpu_suite.sh"), "--device", "cpu", "--quick", "--minutes", "5"]
    command += ["--work", str(tmp_path / "work"), "--json"]
    first = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads(first.stdout.splitlines()[-1])
    assert set(summary["parts"].values()) == {"done"} and list(summary["parts"]) == [p.name for p in suite.PARTS]
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= pack.MOST_FILES and max(path.stat().st_size for path in files) < 16 << 20
    found = state.read(tmp_path / "out" / state.NAME)
    ceilings = found["parts"]["machine"]["result"]["ceilings"]
    assert ceilings["grid_barrier_us"] == ceilings["graph_node_us"] == ceilings["fp8_tflops"]
    assert ceilings["fp8_tflops"] == "not measured: needs CUDA" and ceilings["copy_gbps"] > 0.1
    assert found["commit"] is None and found["source"] == state.source_hash(ROOT)
    assert found["parts"]["tests"]["result"]["jobs"]["test_memory"]["result"]["passed"] > 0
    again = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("done before") == len(suite.PARTS)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
        env=env | {"PYTHONPATH": f"{root}:{BARE}"}, capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    assert collected.returncode in (0, 5), collected.stdout[-2000:]
