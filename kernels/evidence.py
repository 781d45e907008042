"""What has been proven of our GPU kernels, and where: records in files, and the rule that reads them.

Knows records, shape classes, hashes of sources and what was tuned; does not know tables, kernels or clocks: registry.py
asks, validation.py measures.

On a GPU the automatic choice takes a row of ours only where a record shows it correct and faster than the next
candidate: on this GPU name and architecture, for this shape class, with the sources that are here. Nothing is carried
over between GPUs, of one architecture neither: an L4 and a 4090 have a third of each other's bandwidth.

Two files hold records: evidence.json beside this module, which is committed, and the user's own, which
`miss kernels validate` writes ($MISS_EVIDENCE, else miss-engine/evidence.json in the cache folder). A file is
`{"format": 2, "records": [...]}`, a record an object with the fields of `Record`, all of them. Of records of one key
(op, implementation, GPU, architecture, shape class) those of the present sources and launches count before all others,
and of these the newest, whichever file it is in. Another launch is another kernel: what was measured before one was
tuned for a place that the row asks for says nothing of it.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miss.kernels import launches

FORMAT = 2  # 2: a record says which launches it was measured with
FOLDER = Path(__file__).parent
COMMITTED = FOLDER / "evidence.json"
SHARED = ("triton_parts", "launches")  # modules that every Triton row is made of
SLACK = 2.0  # the error rule: ours errs at most twice as much as the plain row
GPUS = {  # as PyTorch names them; any other is asked for by its architecture, or has records
    "Tesla T4": (7, 5),
    "NVIDIA A100-SXM4-40GB": (8, 0),
    "NVIDIA A100-SXM4-80GB": (8, 0),
    "NVIDIA A100 80GB PCIe": (8, 0),
    "NVIDIA A10G": (8, 6),
    "NVIDIA RTX A6000": (8, 6),
    "NVIDIA GeForce RTX 3090": (8, 6),
    "NVIDIA L4": (8, 9),
    "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090": (8, 9),
    "NVIDIA H100 PCIe": (9, 0),
    "NVIDIA H100 80GB HBM3": (9, 0),
    "NVIDIA H200": (9, 0),
    "NVIDIA B200": (10, 0),
    "NVIDIA GeForce RTX 5090": (12, 0),
}
# Operations on rows of numbers: leading dimensions are one, however many they are.
_ROWWISE = ("layer_norm", "add_layer_norm", "linear_into", "gelu_mlp", "quant_linear", "quantise_rows")


class Target(NamedTuple):
    """A GPU: its name as PyTorch says it (None: any of that architecture) and its compute capability."""

    name: str | None
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return self.architecture if self.name is None else f"{self.architecture} ({self.name})"


@dataclass(frozen=True)
class Record:
    """What was measured of one row of a table."""

    op: str
    implementation: str
    gpu: str  # as PyTorch names it; "cpu" in a trial run without one, which no rule reads
    architecture: str  # sm_90
    shape_class: str  # of `shape_class`
    sources: str  # of `sources_hash`
    launches: dict[str, Any]  # each place of launches.py that it asks for: what was tuned for it, None where nothing
    correct: bool  # by the error rule, for every result
    error: float | None  # the largest, relative to the float64 truth's largest value; None where it failed
    plain_error: float | None  # the same of the plain PyTorch row
    candidate: str | None  # the row that would run in its place
    speedup: float | None  # the candidate's time / its time: above 1 is faster
    microseconds: float | None  # its time a call, launch included
    failure: str | None  # the error it ended in, in one line
    versions: dict[str, str]
    date: str  # UTC, 2026-11-24T10:15:00Z

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.implementation, self.gpu, self.architecture, self.shape_class

    @property
    def day(self) -> str:
        return self.date[:10]

    def refusal(self) -> str | None:
        """Why it is no ground to run by itself; None where it is."""
        if self.failure is not None:
            return f"failed on {self.gpu} on {self.day}: {self.failure}"
        if not self.correct:
            return f"measured wrong: error {self.error:.1e}, {self.plain_error:.1e} of plain PyTorch ({self.day})"
        if self.speedup is None or self.speedup <= 1.0:
            return f"measured slower ({self.speedup or 0:.2f}x of {self.candidate}, {self.day})"
        return None

    def __str__(self) -> str:
        return (
            f"{self.speedup or 0:.2f}x of {self.candidate}, error {self.error or 0:.1e} "
            f"({self.plain_error or 0:.1e} of plain PyTorch), {self.gpu}, {self.day}"
        )


Item = Any  # of a signature: (dtype, shape), a bool, a number's size, a name
Signature = tuple[Item, ...]


def signature(args: tuple[Any, ...]) -> Signature:
    """What of a call's arguments its shape class depends on: cheap, as it is made at every call on a GPU."""
    return tuple([(a.dtype, a.shape) if isinstance(a, Tensor) else None if a is None else _item(a) for a in args])


def _item(value: Any) -> Item:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value.bit_length()
    if isinstance(value, float):
        return "0" if value == 0.0 else "x"  # whether there is dropout, smoothing, …
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return len(value).bit_length(), value[0].dtype, sum(v.numel() for v in value).bit_length()
    return type(value).__name__


@functools.lru_cache(maxsize=4096)
def shape_class(op: str, call: Signature) -> str:
    """The class of calls that one measurement stands for: dtypes, options, and sizes down to a power of two.

    Total: whatever the arguments, there is a class; one without a record is unvalidated.
    """
    rowwise = op.removesuffix("_backward").startswith(_ROWWISE) or op.removesuffix("_backward") == "linear"
    names = [_name(item, rowwise) for item in call]
    parts: list[list[Any]] = []
    for name in names:
        if parts and parts[-1][0] == name:
            parts[-1][1] += 1
        else:
            parts.append([name, 1])
    return " ".join(name if count == 1 else f"{count}*{name}" for name, count in parts)


def _name(item: Item, rowwise: bool) -> str:
    if not isinstance(item, tuple):
        return "-" if item is None else str(_floor(item) if type(item) is int else item)
    if len(item) == 3:
        count, dtype, total = item
        return f"{_floor(count)} of {_short(dtype)}[{_floor(total)}]"
    dtype, sizes = item
    if rowwise and len(sizes) > 2:
        sizes = (sizes.numel() // max(1, sizes[-1]), sizes[-1])
    return f"{_short(dtype)}[{','.join(str(_floor(size.bit_length())) for size in sizes)}]"


def _floor(bits: int) -> int:
    return 1 << (bits - 1) if bits else 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradient(name: str) -> str:
    """The class of the same call whose gradient is wanted: its time is that of both passes."""
    return f"{name} with gradient"


@functools.cache
def sources_hash(modules: tuple[str, ...]) -> str:
    """Hash of the sources that a row is made of: `modules` of miss.kernels ("attention.triton_impl"), the shared
    Triton modules, and every Triton module that these import. Line ends do not count, comments do."""
    waiting, found = [*modules, *SHARED], dict[str, bytes]()
    while waiting:
        module = waiting.pop()
        path = FOLDER.joinpath(*module.split(".")).with_suffix(".py")
        if module in found or not path.is_file():
            continue
        found[module] = path.read_bytes().replace(b"\r\n", b"\n")
        waiting += [name for name in _imported(found[module]) if name.split(".")[-1].startswith("triton_")]
    digest = hashlib.sha256()
    for module in sorted(found):
        digest.update(module.encode() + b"\0" + found[module] + b"\0")
    return digest.hexdigest()[:16]


def _imported(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("miss.kernels"):
            inside = (node.module or "").removeprefix("miss.kernels").removeprefix(".")
            yield inside
            yield from (f"{inside}.{alias.name}".removeprefix(".") for alias in node.names)


def user_file() -> Path | None:
    """Where the user's own records are; None where there is neither a variable nor a home."""
    if named := os.environ.get("MISS_EVIDENCE"):
        return Path(named)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home to be found
        return None
    return cache / "miss-engine" / "evidence.json"


def read(path: Path) -> list[Record]:
    """A file's records; none where it does not exist.

    Raises:
        ValueError: it is not a file of records; the message names it and says what is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _unreadable(path, str(error)) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(path, f"not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise _unreadable(path, 'wanted {"format": 2, "records": [...]}')
    if content.get("format") != FORMAT:
        raise _unreadable(path, f"its format is {content.get('format')!r}, this version reads {FORMAT}")
    return [_parse(path, at, value) for at, value in enumerate(content["records"])]


_FIELDS = {field.name: field.type for field in dataclasses.fields(Record)}
_NUMBERS = ("error", "plain_error", "speedup", "microseconds")


def _parse(path: Path, at: int, value: Any) -> Record:
    if not isinstance(value, dict) or value.keys() != _FIELDS.keys():
        odd = sorted(value.keys() ^ _FIELDS.keys()) if isinstance(value, dict) else "it is no object"
        raise _unreadable(path, f"record {at} has other fields than it should: {odd}")
    for name in _FIELDS:
        one = value[name]
        if name in _NUMBERS:
            right = one is None or (isinstance(one, int | float) and not isinstance(one, bool))
        elif name in ("candidate", "failure"):
            right = one is None or isinstance(one, str)
        else:
            right = isinstance(one, {"correct": bool, "versions": dict, "launches": dict}.get(name, str))
        if not right:
            raise _unreadable(path, f"record {at}: {name} is {one!r}, wanted {_FIELDS[name]}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value["date"]):
        raise _unreadable(path, f"record {at}: date is {value['date']!r}, wanted 2026-11-24T10:15:00Z")
    if value["failure"] is None and (value["error"] is None or value["plain_error"] is None):
        raise _unreadable(path, f"record {at} has neither errors nor a failure")
    return Record(**value)


def _unreadable(path: Path, why: str) -> ValueError:
    return ValueError(f"evidence file {path}: {why}; correct it, or delete it and run `miss kernels validate`")


def write(path: Path, records: Iterable[Record]) -> None:
    """Adds records to a file, in place of those of their keys; whole or not at all, and one process at a time.

    Raises:
        ValueError: what is there is not a file of records. OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        kept = {record.key: record for record in (*read(path), *records)}
        rows = [dataclasses.asdict(kept[key]) for key in sorted(kept)]
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "records": rows}, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    forget()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # where Triton runs there is one

    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def records() -> tuple[Record, ...]:
    """All records of both files."""
    own = user_file()
    return tuple([*read(COMMITTED), *(read(own) if own is not None else [])])


def forget() -> None:
    """Reads the files anew at the next choice."""
    launches.tuned.cache_clear()
    records.cache_clear()
    _of_row.cache_clear()
    judge.cache_clear()


@functools.cache
def _of_row(op: str, implementation: str, target: Target) -> tuple[Record, ...]:
    """A row's records on a GPU; on any of its architecture where it has no name."""
    return tuple(
        r
        for r in records()
        if (r.op, r.implementation, r.architecture) == (op, implementation, target.architecture)
        and target.name in (None, r.gpu)
    )


def _best(found: Iterable[Record], sources: str) -> Record:
    return max(found, key=lambda r: (r.sources == sources, current(r), r.date))


def current(record: Record) -> bool:
    """Whether what it was measured with is what runs now, as far as launches go."""
    return launches.same(record.launches, launches.tuned(record.gpu))


class Verdict(NamedTuple):
    """`reason`: why a row of ours does not run by itself, None where it does; `record`: what that rests on."""

    reason: str | None
    record: Record | None


def on_record(op: str, implementation: str, modules: tuple[str, ...], target: Target) -> Verdict:
    """The rule before shapes are known: refused where no shape class of this GPU would be taken."""
    found = _of_row(op, implementation, target)
    if not found:
        return Verdict(f"unvalidated: never run on {target}", None)
    sources = sources_hash(modules)
    verdicts = [_weigh(r, sources) for r in found]
    return next((v for v in verdicts if v.reason is None), verdicts[0])


def _weigh(record: Record, sources: str) -> Verdict:
    if record.sources != sources:
        return Verdict(f"unvalidated: source changed since {record.day}", record)
    if not current(record):
        return Verdict(f"unvalidated: another launch was tuned since {record.day}", record)
    return Verdict(record.refusal(), record)


@functools.lru_cache(maxsize=8192)
def judge(
    op: str, implementation: str, modules: tuple[str, ...], target: Target, call: Signature, gradient: bool
) -> Verdict:
    """The rule for a call. With `gradient` both are asked for: the call alone, and with its gradient."""
    found = _of_row(op, implementation, target)
    if not found:
        return Verdict(f"unvalidated: never run on {target}", None)
    name = shape_class(op, call)
    verdict = Verdict(None, None)
    for asked in (name, with_gradient(name)) if gradient else (name,):
        same = [r for r in found if r.shape_class == asked]
        if not same:
            return Verdict(f"unvalidated: never run on {target} at {asked}", None)
        sources = sources_hash(modules)
        verdict = _weigh(_best(same, sources), sources)
        if verdict.reason is not None:
            break
    return verdict


def find_target(text: str) -> Target:
    """ "sm_90", or a GPU's name that is known here or on record.

    Raises:
        ValueError: neither; the message names those that are.
    """
    if found := re.fullmatch(r"sm_(\d{1,2})(\d)a?", text):
        return Target(None, (int(found[1]), int(found[2])))
    known = dict(GPUS)
    for record in records():
        if made := re.fullmatch(r"sm_(\d{1,2})(\d)", record.architecture):
            known.setdefault(record.gpu, (int(made[1]), int(made[2])))
    for name, capability in known.items():
        if name.lower() == text.lower():
            return Target(name, capability)
    raise ValueError(f'no GPU is known as "{text}"; say its architecture (sm_90), or one of: {", ".join(known)}')
