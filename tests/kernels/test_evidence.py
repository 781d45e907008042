"""The evidence rule: what a record must say for a GPU kernel of ours to run by itself. No GPU is needed or imitated:
choices are made as for one, what is chosen is computed by the reference."""

import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from miss.kernels import evidence, launches, registry
from miss.kernels.evidence import COMMITTED, Target, find_target
from miss.kernels.records import Record, read
from miss.kernels.registry import OPS, Impl, Op, use
from miss.kernels.shape_classes import shape_class, signature, with_gradient
from tests.helpers import run_python

H100 = Target("NVIDIA H100 80GB HBM3", (9, 0))
H200 = Target("NVIDIA H200", (9, 0))


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[Path]:
    """The user's file, and a committed one without records; both in a folder of this test's."""
    monkeypatch.setattr(evidence, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setenv("MISS_EVIDENCE", str(tmp_path / "own" / "evidence.json"))
    evidence.forget()
    yield tmp_path / "own" / "evidence.json"
    evidence.forget()


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of kernels: toy/triton_impl.py and what it imports."""
    (tmp_path / "toy").mkdir()
    for name, text in {
        "toy/triton_impl.py": "from miss.kernels.toy.triton_more import add\nfrom miss.kernels.toy import reference\n",
        "toy/triton_more.py": "def add(): ...\n",
        "toy/reference.py": "",
        "triton_parts.py": "",
        "launches.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    evidence.sources_hash.cache_clear()
    yield tmp_path
    evidence.sources_hash.cache_clear()


@pytest.fixture
def toy() -> Iterator[Op]:
    """A table with a GPU kernel of ours, and a backward table of its own."""
    ours = Impl("triton", lambda x: x, device="cuda", capability=(8, 0), sources=("ema.triton_impl",))
    op = Op("toy", ours, Impl("torch", lambda x: x * 1, composite=True), Impl("reference", lambda x: x * 1))
    Op("toy_backward", ours, Impl("torch", lambda x: x), Impl("reference", lambda x: x))
    yield op
    del OPS["toy"], OPS["toy_backward"]
    evidence.forget()


X = torch.ones(4, 70)


def record(**changes) -> Record:
    usual = Record(
        op="toy",
        implementation="triton",
        gpu="NVIDIA H100 80GB HBM3",
        architecture="sm_90",
        shape_class=shape_class("toy", signature((X,))),
        sources=evidence.sources_hash(("ema.triton_impl",)),
        launches={},
        correct=True,
        error=1e-3,
        plain_error=2e-3,
        candidate="torch",
        speedup=1.4,
        microseconds=12.5,
        failure=None,
        versions={"torch": "2.11.0"},
        date="2026-11-24T10:15:00Z",
    )
    return dataclasses.replace(usual, **changes)


def reason(op: Op, target: Target = H100, x: torch.Tensor = X) -> str | None:
    with registry.pretend(target), torch.no_grad():
        return op.why_not(op.impls[0], x)


def chosen(op: Op, target: Target, x: torch.Tensor) -> str:
    names = []
    with registry.pretend(target), registry.watch(lambda _, args, impl: names.append(impl.name)):
        op.select(x)
    return names[0]


def test_the_committed_file_can_be_read():
    assert all(len(r.sources) == 16 for r in read(COMMITTED))


def test_without_a_record_the_next_candidate_runs(own, toy):
    assert reason(toy) == "unvalidated: never run on sm_90 (NVIDIA H100 80GB HBM3)"
    assert reason(toy, Target(None, (9, 0))) == "unvalidated: never run on sm_90"
    assert reason(toy, Target("Tesla T4", (7, 5))) == "needs compute capability (8, 0), got (7, 5)"
    assert chosen(toy, H100, X) == "torch"
    with use(toy="triton"):  # forcing always works
        assert reason(toy) is None


def test_a_launch_that_is_tuned_later_makes_the_record_stale(own, toy, tmp_path, monkeypatch):
    """Another launch is another kernel: neither right nor faster until it is measured."""
    place, launch = "ema/any/float32", {"blocks": {"BLOCK": 64}, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(launches, "TUNED", tmp_path / "tuned")
    evidence.write(own, [record(launches={place: None})])
    assert reason(toy) is None
    (tmp_path / "tuned").mkdir()
    op, kind, shape = place.split("/")
    path = tmp_path / "tuned" / launches.file_name(H100.name)
    path.write_text(json.dumps({op: {kind: {shape: launch, "bfloat16": launch}}}))
    evidence.forget()
    assert reason(toy) == "unvalidated: another launch was tuned since 2026-11-24"
    evidence.write(own, [record(launches={place: launch}, date="2026-11-25T00:00:00Z")])
    assert reason(toy) is None
    path.unlink()
    evidence.forget()
    assert reason(toy) == "unvalidated: another launch was tuned since 2026-11-25"
    evidence.write(evidence.COMMITTED, [record(launches={place: None})])  # older, and of the launch that runs
    assert reason(toy) is None


def test_with_one_it_runs(own, toy):
    evidence.write(own, [record()])
    assert reason(toy) is None and chosen(toy, H100, X) == "triton"
    assert reason(toy, Target(None, (9, 0))) is None  # on some GPU of that architecture, and the record says on which
    assert "never run on sm_90 (NVIDIA H200)" in str(reason(toy, H200))  # nothing is carried over between GPUs
    with registry.pretend(H100), torch.no_grad():
        assert str(toy.verdict(toy.impls[0], X).record) == (
            "1.40x of torch, error 1.0e-03 (2.0e-03 of plain PyTorch), NVIDIA H100 80GB HBM3, 2026-11-24"
        )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"speedup": 0.83}, "measured slower (0.83x of torch, 2026-11-24)"),
        ({"speedup": 1.0}, "measured slower (1.00x"),
        ({"sources": "0" * 16}, "unvalidated: source changed since 2026-11-24"),
        ({"correct": False, "error": 0.5}, "measured wrong: error 5.0e-01, 2.0e-03 of plain PyTorch (2026-11-24)"),
        (
            {"failure": "CUDA error: an illegal memory access", "correct": False, "error": None},
            "failed on NVIDIA H100 80GB HBM3 on 2026-11-24: CUDA error: an illegal memory access",
        ),
        ({"shape_class": "float32[8,64]"}, "never run on sm_90 (NVIDIA H100 80GB HBM3) at float32[4,64]"),
        ({"architecture": "cpu", "gpu": "cpu"}, "unvalidated: never run on sm_90"),
        ({"op": "another"}, "unvalidated: never run on sm_90"),
    ],
)
def test_what_a_record_does_not_allow(own, toy, changes, says):
    evidence.write(own, [record(**changes)])
    assert says in str(reason(toy))
    assert chosen(toy, H100, X) == "torch"


def test_a_gradient_wants_evidence_of_both_passes(own, toy):
    wanted = X.clone().requires_grad_()
    evidence.write(own, [record()])
    assert chosen(toy, H100, wanted) == "torch"
    with torch.no_grad():
        assert chosen(toy, H100, wanted) == "triton"
    both = with_gradient(record().shape_class)
    evidence.write(own, [record(shape_class=both, speedup=0.9)])
    assert chosen(toy, H100, wanted) == "torch"
    evidence.write(own, [record(shape_class=both)])
    assert chosen(toy, H100, wanted) == "triton"


def test_the_newest_record_of_a_key_wins_and_present_sources_before_it(own, toy, tmp_path):
    evidence.write(own, [record(speedup=0.5, date="2026-11-25T00:00:00Z")])
    evidence.write(evidence.COMMITTED, [record()])
    assert "measured slower (0.50x" in str(reason(toy))
    evidence.write(evidence.COMMITTED, [record(date="2026-11-26T00:00:00Z")])
    assert reason(toy) is None
    # The user measured an older version after the project's own record of this one was made.
    evidence.write(own, [record(sources="0" * 16, date="2026-11-27T00:00:00Z")])
    assert reason(toy) is None


def test_a_row_of_which_something_is_on_record_is_listed_as_running(own, toy, monkeypatch):
    monkeypatch.setattr(registry, "_target", lambda device: H100)
    cuda = torch.device("cuda")
    assert "never run" in str(toy.here(cuda, torch.float32)[0][1])
    evidence.write(own, [record(speedup=0.7), record(shape_class="float32[8,64]", speedup=0.8)])
    assert "slower" in str(toy.here(cuda, torch.float32)[0][1])
    evidence.write(own, [record(shape_class="float32[8,64]")])
    assert toy.here(cuda, torch.float32)[0][1] is None


def test_on_the_cpu_evidence_is_not_asked(toy, monkeypatch):
    monkeypatch.setattr(evidence, "records", lambda: pytest.fail("read"))
    assert toy.select(X).name == "torch"
    assert toy.why_not(toy.impls[0], X) == "needs a cuda tensor, got cpu"


def test_what_cannot_run_here_is_computed_by_the_reference(own, toy):
    evidence.write(own, [record()])
    with registry.pretend(H100), torch.no_grad():
        assert toy.select(X).name == "reference" and toy(X) is not X
    with registry.pretend(H200):
        assert toy.select(X).name == "torch"


def test_every_triton_row_says_its_sources():
    registry.load_all()
    rows = [(op.name, impl) for op in OPS.values() for impl in op.impls if impl.name == "triton"]
    assert rows
    for name, impl in rows:
        assert impl.sources, name
        assert all((evidence.FOLDER / f"{module.replace('.', '/')}.py").is_file() for module in impl.sources), name


@pytest.mark.parametrize("changed", ["toy/triton_impl.py", "toy/triton_more.py", "triton_parts.py", "launches.py"])
def test_the_hash_follows_the_sources(sources, changed):
    before = evidence.sources_hash(("toy.triton_impl",))
    path = sources / changed
    path.write_text(path.read_text() + "# changed\n")
    evidence.sources_hash.cache_clear()
    assert evidence.sources_hash(("toy.triton_impl",)) != before


def test_the_hash_follows_nothing_else(sources):
    before = evidence.sources_hash(("toy.triton_impl",))
    (sources / "toy/reference.py").write_text("# not a part of the kernel\n")
    text = (sources / "toy/triton_impl.py").read_bytes()
    (sources / "toy/triton_impl.py").write_bytes(text.replace(b"\n", b"\r\n"))
    evidence.sources_hash.cache_clear()
    assert evidence.sources_hash(("toy.triton_impl",)) == before


@pytest.mark.parametrize(
    ("op", "args", "name"),
    [
        ("attention", (torch.ones(2, 577, 12, 64), None, True, 0.125, 0.0), "float32[2,512,8,64] - True x 0"),
        ("attention", (torch.ones(2, 577, 12, 64),) * 3, "3*float32[2,512,8,64]"),
        ("layer_norm", (torch.ones(2, 577, 768, dtype=torch.bfloat16), 1e-5), "bfloat16[1024,512] x"),
        ("layer_norm_backward", (torch.ones(1154, 768),), "float32[1024,512]"),
        ("linear", (torch.ones(3, 5, 7),), "float32[8,4]"),
        ("linear_cross_entropy", (torch.ones(3, 5, 7),), "float32[2,4,4]"),
        ("ema", (torch.ones(3), [torch.ones(3), torch.ones(5)], 0.9), "float32[2] 2 of float32[8] x"),
        ("kv_append", (torch.ones(0, 4), 18, -100, "none", torch.float32, ()), "float32[0,4] 16 64 none dtype tuple"),
        ("toy", (), ""),
    ],
)
def test_shape_classes(op, args, name):
    assert shape_class(op, signature(args)) == name


def test_sizes_of_one_class_lie_within_a_factor_of_two():
    names = [shape_class("attention", signature((torch.ones(size, 1),))) for size in (8, 15, 16, 31, 32)]
    assert names[0] == names[1] != names[2] == names[3] != names[4]


def test_the_users_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MISS_EVIDENCE", "/a/b.json")
    assert evidence.user_file() == Path("/a/b.json")
    monkeypatch.delenv("MISS_EVIDENCE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert evidence.user_file() == tmp_path / "miss-engine" / "evidence.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert evidence.user_file() == Path.home() / ".cache" / "miss-engine" / "evidence.json"


GOOD = dataclasses.asdict(record())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "wanted {"),
        ('{"format": 1, "records": []}', "format is 1"),
        (json.dumps({"format": 2, "records": [{"op": "toy"}]}), "record 0 has other fields"),
        (json.dumps({"format": 2, "records": [GOOD, GOOD | {"speedup": "fast"}]}), "record 1: speedup is 'fast'"),
        (json.dumps({"format": 2, "records": [GOOD | {"correct": 1}]}), "record 0: correct is 1"),
        (json.dumps({"format": 2, "records": [GOOD | {"date": "yesterday"}]}), "record 0: date is 'yesterday'"),
        (json.dumps({"format": 2, "records": [GOOD | {"error": None}]}), "neither errors nor a failure"),
    ],
)
def test_a_file_that_is_none_is_named(own, toy, text, says):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.raises(ValueError, match="evidence file") as error:
        reason(toy)
    assert str(own) in str(error.value) and says in str(error.value) and "miss kernels validate" in str(error.value)
    with pytest.raises(ValueError, match="evidence file"):  # nor is it written over
        evidence.write(own, [record()])
    assert own.read_text() == text


def test_bytes_that_are_no_text_are_named(own, toy):
    own.parent.mkdir()
    own.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="evidence file"):
        reason(toy)


def test_writing_keeps_other_keys_and_replaces_its_own(own):
    evidence.write(own, [record(), record(op="other")])
    evidence.write(own, [record(speedup=2.0)])
    assert {(r.op, r.speedup) for r in read(own)} == {("toy", 2.0), ("other", 1.4)}
    assert [p.name for p in own.parent.iterdir() if p.name.endswith(".json")] == ["evidence.json"]


def _write_many(path: Path, first: int) -> None:
    for i in range(first, first + 10):
        evidence.write(path, [record(op=f"op{i}")])


def test_writers_at_the_same_time_lose_nothing(own):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(own, 10 * i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {r.op for r in read(own)} == {f"op{i}" for i in range(40)}


def test_targets(own):
    assert find_target("sm_90") == find_target("sm_90a") == Target(None, (9, 0))
    assert find_target("sm_120").capability == (12, 0) and find_target("sm_120").architecture == "sm_120"
    assert find_target("nvidia h100 80gb hbm3") == H100
    with pytest.raises(ValueError, match=r"no GPU is known as .*NVIDIA H200"):
        find_target("NVIDIA H300")
    evidence.write(own, [record(gpu="NVIDIA H300")])
    assert find_target("NVIDIA H300") == Target("NVIDIA H300", (9, 0))


def test_importing_miss_reads_no_evidence():
    done = run_python("import miss.kernels.ema; print('ok')", MISS_EVIDENCE="/dev/null")
    assert done.stdout.strip() == "ok", done.stderr
