"""What has been proven of our GPU kernels, and where: the rule that reads the records.

Knows which records count: their GPUs, hashes of sources, what was tuned; does not know tables, kernels or clocks, nor a
record's file (records.py) or a call's class (shape_classes.py): registry.py asks, validation.py measures.

On a GPU the automatic choice takes a row of ours only where a record shows it correct and faster than the next
candidate: on this GPU name and architecture, for this shape class, with the sources that are here. Nothing is carried
over between GPUs, of one architecture neither: an L4 and a 4090 have a third of each other's bandwidth.

Two files hold records: evidence.json beside this module, which is committed, and the user's own, which
`miss kernels validate` writes ($MISS_EVIDENCE, else miss-engine/evidence.json in the cache folder). Of records of one
key (op, implementation, GPU, architecture, shape class) those of the present sources and launches count before all
others, and of these the newest, whichever file it is in. Another launch is another kernel: what was measured before one
was tuned for a place that the row asks for says nothing of it.
"""

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from miss.kernels import launches
from miss.kernels.records import Record, read
from miss.kernels.records import write as write_records
from miss.kernels.shape_classes import Signature, shape_class, with_gradient

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


class Target(NamedTuple):
    """A GPU: its name as PyTorch says it (None: any of that architecture) and its compute capability."""

    name: str | None
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return self.architecture if self.name is None else f"{self.architecture} ({self.name})"


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


def write(path: Path, found: Iterable[Record]) -> None:
    """Adds records to a file (records.write), and reads the files anew at the next choice."""
    write_records(path, found)
    forget()


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
