"""A run on a GPU comes into the repository: nothing is lost, nothing foreign comes in unasked, nothing damaged ever."""

import dataclasses
import json

import pytest

from miss.benchmarks.gpu import merge as merging
from miss.benchmarks.gpu import state, summary
from miss.benchmarks.gpu.summary import AIMS, Results
from miss.cli import run
from miss.kernels import evidence
from miss.kernels.records import Record, read

RECORD = Record(
    op="toy",
    implementation="triton",
    gpu="NVIDIA H200",
    architecture="sm_90",
    shape_class="bfloat16[4]",
    sources="0" * 16,
    launches={},
    correct=True,
    error=0.001,
    plain_error=0.001,
    candidate="torch",
    speedup=2.0,
    microseconds=10.0,
    failure=None,
    versions={},
    date="2026-11-24T10:15:00Z",
)
VIT = "vit B=32 T=577 H=12 D=64"


def row(implementation: str, ms: float, ours: bool = False, **more) -> dict:
    base = {"record": "row", "op": "attention", "shape": VIT, "dtype": "bfloat16", "cache": "warm", "gbps": 1.0}
    return base | {"implementation": implementation, "median_ms": ms, "ours": ours} | more


@pytest.fixture
def root(tmp_path):
    """A repository with a record of its own."""
    for name in ("kernels", "models", "engine"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "op.py").write_text("x = 1\n")
    evidence.write(tmp_path / "root" / "kernels" / "evidence.json", [RECORD])
    return tmp_path / "root"


def records(root) -> dict[tuple[str, ...], Record]:
    return {record.key: record for record in read(root / "kernels" / "evidence.json")}


def results(folder, root, key="key", rows=(), found=(), **head):
    """What the suite writes, of these sources."""
    folder.mkdir(exist_ok=True)
    content = {"format": 1, "key": key, "source": state.source_hash(root), "commit": None, "device": "cuda"}
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0"}
    parts = {"machine": {"status": "done", "seconds": 3.0, "result": {"ceilings": {"copy_gbps": 4300.0}}}}
    content |= {"quick": False, "environment": environment, "parts": parts, **head}
    state.write_json(folder / state.NAME, content)
    lines = [{"record": "environment"}, *(rows or [row("triton", 1.0, True), row("sdpa", 1.5), row("flex", 1.4)])]
    (folder / "kernels-cuda.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if found:
        evidence.write(folder / "evidence.json", found)
    return folder


def test_evidence_files_and_a_page_come_in(tmp_path, root):
    other = dataclasses.replace(RECORD, shape_class="bfloat16[8]")
    found = merging.merge(results(tmp_path / "run", root, found=[other]), root)
    assert records(root) == {RECORD.key: RECORD, other.key: other}
    assert found.records == 1 and found.kept == 1
    names = {path.name for path in (root / "benchmarks" / "results").iterdir()}
    assert names == {"suite-nvidia-h200.json", "kernels-nvidia-h200.jsonl", "gpu-nvidia-h200.md"}
    page = (root / "benchmarks" / "results" / "gpu-nvidia-h200.md").read_text()
    assert "| attention, 577 tokens, forward, of the best peer | ≥ 1.3 | 1.4 | met |" in page
    assert "| copy_gbps | 4300.0 |" in page and page.count("not measured") == len(AIMS) - 1
    before = (root / "kernels" / "evidence.json").read_bytes()
    merging.merge(tmp_path / "run", root)
    assert (root / "kernels" / "evidence.json").read_bytes() == before


def test_of_one_key_the_newer_record_stays(tmp_path, root):
    old = dataclasses.replace(RECORD, speedup=9.0, date="2020-01-01T00:00:00Z")
    new = dataclasses.replace(RECORD, speedup=0.5, date="2027-01-01T00:00:00Z")
    merging.merge(results(tmp_path / "old", root, found=[old]), root)
    assert records(root) == {RECORD.key: RECORD}
    merging.merge(results(tmp_path / "new", root, found=[new]), root)
    assert records(root) == {new.key: new}


def test_results_of_other_sources_are_refused_unless_it_is_said_and_then_replace_nothing(tmp_path, root):
    new = dataclasses.replace(RECORD, speedup=0.5, date="2027-01-01T00:00:00Z")
    other = dataclasses.replace(RECORD, op="toy2")
    folder = results(tmp_path / "run", root, found=[new, other], source="f" * 16)
    with pytest.raises(ValueError, match="--any-source"):
        merging.merge(folder, root)
    assert not (root / "benchmarks").exists()
    merging.merge(folder, root, any_source=True)
    assert records(root) == {RECORD.key: RECORD, other.key: other}


def test_what_was_tuned_is_added_place_by_place_and_not_from_other_sources(tmp_path, root):
    def tuned(name, kind, num_warps, **head):
        folder = results(tmp_path / name, root, **head)
        launch = {"blocks": {"BM": 64}, "num_warps": num_warps, "num_stages": 2}
        table = {"attention": {"long": {kind: launch}}}
        (folder / "tuned.json").write_text(json.dumps({"gpu": "NVIDIA H200", "table": table}))
        return folder

    path = root / "kernels" / "tuned" / "NVIDIA_H200.json"
    merging.merge(tuned("a", "bfloat16 64", 4), root)
    merging.merge(tuned("b", "float16 64", 8), root)
    merging.merge(tuned("c", "bfloat16 64", 2, source="f" * 16), root, any_source=True)
    assert {shape: x["num_warps"] for shape, x in json.loads(path.read_text())["attention"]["long"].items()} == {
        "bfloat16 64": 4, "float16 64": 8,
    }  # fmt: skip
    wrong = {"attention": {"long": {"bfloat16 64": {"warps": 4}}}}
    (tmp_path / "a" / "tuned.json").write_text(json.dumps({"gpu": "NVIDIA H200", "table": wrong}))
    with pytest.raises(ValueError, match=r"tuned\.json"):
        merging.merge(tmp_path / "a", root)


def test_records_of_other_launches_than_are_tuned_now_are_counted(tmp_path, root):
    launch = {"blocks": {"BM": 64}, "num_warps": 8, "num_stages": 2}
    old, new = (
        dataclasses.replace(RECORD, op=f"toy{i}", launches={"toy/long/bfloat16 64": value})
        for i, value in enumerate((None, launch))
    )
    folder = results(tmp_path / "run", root, found=[old, new])
    table = {"toy": {"long": {"bfloat16 64": launch}}}
    (folder / "tuned.json").write_text(json.dumps({"gpu": "NVIDIA H200", "table": table}))
    assert merging.merge(folder, root).stale == 1


def test_a_second_run_adds_and_one_of_another_key_lies_beside(tmp_path, root):
    merging.merge(results(tmp_path / "a", root), root)
    tests = {"tests": {"status": "done", "seconds": 1.0, "result": {}}, "machine": {"status": "failed"}}
    merging.merge(results(tmp_path / "b", root, rows=[row("sdpa", 2.0, shape="another")], parts=tests), root)
    folder = root / "benchmarks" / "results"
    found = json.loads((folder / "suite-nvidia-h200.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {"machine": "done", "tests": "done"}
    assert len((folder / "kernels-nvidia-h200.jsonl").read_text().splitlines()) == 5
    earlier = {path.name: path.read_bytes() for path in folder.iterdir()}
    merging.merge(results(tmp_path / "c", root, key="another"), root)
    beside = f"kernels-nvidia-h200-{state.source_hash(root)}.jsonl"
    assert (folder / beside).read_bytes() == earlier["kernels-nvidia-h200.jsonl"]
    assert len((folder / "kernels-nvidia-h200.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", [state.NAME, "kernels-cuda.jsonl", "evidence.json", "answers.json"])
@pytest.mark.parametrize(
    "text", ['{"format": 1,', "[3]", "\x00\x01", '{"format": 1, "parts": {"a": 1}, "records": [1]}']
)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, root, name, text, capsys):
    folder = results(tmp_path / "run", root, found=[dataclasses.replace(RECORD, op="toy2")])
    (folder / name).write_text(text)
    before = (root / "kernels" / "evidence.json").read_bytes()
    assert run(["bench", "merge", str(folder), "--into", str(root)]) == 1
    assert name in capsys.readouterr().err
    assert (root / "kernels" / "evidence.json").read_bytes() == before and not (root / "benchmarks").exists()


@pytest.mark.parametrize("head", [{"device": "cpu"}, {"quick": True}])
def test_a_trial_proves_nothing(tmp_path, root, head):
    folder = results(tmp_path / "run", root, **head)
    (folder / "kernels-cpu.jsonl").write_text((folder / "kernels-cuda.jsonl").read_text())
    evidence.write(folder / "evidence.json", [dataclasses.replace(RECORD, gpu="cpu", architecture="cpu", op="toy2")])
    with pytest.raises(ValueError, match="--trial"):
        merging.merge(folder, root)
    found = merging.merge(folder, root, trial=True)
    assert found.records == 0 and read(root / "kernels" / "evidence.json") == [RECORD]
    assert "| met |" not in found.page and "not measured: a trial" in found.page


def test_no_results_or_no_repository_is_one_line(tmp_path, root, capsys):
    assert run(["bench", "merge", str(tmp_path / "none"), "--into", str(root)]) == 1
    assert "gpu_suite.sh" in capsys.readouterr().err
    assert run(["bench", "merge", str(tmp_path), "--into", str(tmp_path)]) == 1
    assert "the repository's root" in capsys.readouterr().err


def verdicts(**found) -> dict[str, tuple[str, str, str]]:
    content = {"device": "cuda", "quick": False, "parts": {}, **found.pop("state", {})}
    whole = Results(content, found.get("lines", []), found.get("answers", {}))
    return {aim.name: aim.verdict(whole) for aim in AIMS}


def test_nothing_measured_is_said_of_every_aim():
    assert {verdict for _, _, verdict in verdicts().values()} == {"not measured"}


def test_the_best_peer_counts_and_a_library_in_a_table_is_a_peer():
    name = "attention, 577 tokens, forward, of the best peer"
    lines = [row("triton", 1.0, True), row("sdpa", 2.0), row("flex", 1.2), row("sdpa", 0.1, cache="cold")]
    assert verdicts(lines=lines)[name] == ("≥ 1.3", "1.2", "**not met**")
    assert verdicts(lines=lines[1:])[name][2] == "not measured"
    liger = "cross entropy, with gradient, of Liger"
    shape = {"op": "linear_cross_entropy", "shape": "forward+backward M=2400 V=30524 C=768"}
    assert verdicts(lines=[row("triton", 1.0, True, **shape), row("eager", 9.0, **shape)])[liger][2] == "not measured"


def test_answers_floors_and_memory_are_ratios_the_right_way_round():
    def answers(label, **ms):
        rows = {name.replace("_", "-"): {"ms": {"median": value}} for name, value in ms.items()}
        ratios = {name: {"median": row["ms"]["median"] / ms["miss_bf16"]} for name, row in rows.items()}
        return {label: {"rows": rows, "ratios": ratios}}

    found = answers("base-384px-b1-q1-t4", miss_bf16=1.0, hf_bf16=12.0) | answers("base-384px-b1-q64-t4", miss_bf16=4.0)
    memory = {"complete": True, "jobs": {"memory": {"result": {"contrastive": {"triton": 4, "torch": 100}}}}}
    got = verdicts(answers=found, state={"parts": {"kernels": {"result": memory}}})
    assert got["one answer, of Hugging Face eager"] == ("≥ 10", "12", "met")
    assert got["one answer, in floors of an H200 (0.43 ms)"] == ("≤ 3", "2.33", "met")
    assert got["64 questions an image, of asked apart"] == ("≥ 12", "16", "met")
    assert got["contrastive, with gradient, share of eager's memory"] == ("≤ 0.05", "0.04", "met")
    memory["jobs"]["memory"]["result"] = {"contrastive": "not measured: needs CUDA"}
    got = verdicts(answers=found, state={"parts": {"kernels": {"result": memory}}})
    assert got["contrastive, with gradient, share of eager's memory"][2] == "not measured"


def test_where_ours_loses_is_listed_the_worst_first():
    lines = [
        row("triton", 2.0, True),
        row("sdpa", 1.0),
        row("triton", 1.1, True, shape="b"),
        row("sdpa", 1.0, shape="b"),
    ]
    text = summary._slower(lines)
    assert "2 of 2 cases" in text[0] and text[1].startswith("- 0.50x of attention vit") and "0.91x" in text[2]
