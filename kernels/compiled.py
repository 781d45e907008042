"""kernels/compiled.json: what every Triton kernel takes, compiled ahead of time; what of it is a fault; as a table.

Knows figures and the published limits of architectures; does not know triton, nor how a kernel is compiled.

A row is a case (kernels/launches.py) on an architecture: registers and spilled bytes a thread, shared memory a program,
tensor core instructions in its machine code, and the share of a multiprocessor's warps that fit at once (occupancy).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPORT = Path(__file__).with_name("compiled.json")
ARCHS = ("sm_80", "sm_90")  # those that the report holds
MORE_REGISTERS = 1.1  # beyond it a default configuration fails

Key = tuple[str, str, str]  # operation, case, architecture


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: warps and blocks at once, bytes of shared memory; and the bytes that one block may take."""

    warps: int
    blocks: int
    shared: int
    block_shared: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". All have 65,536 registers, given to
# warps in steps of 256, to four schedulers; shared memory in steps of 128 bytes, 1,024 of each block for the system.
LIMITS = {
    "sm_80": Limits(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Limits(64, 32, 228 * 1024, 227 * 1024),
    "sm_120": Limits(48, 24, 100 * 1024, 99 * 1024),
}


def occupancy(arch: str, warps: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's warps that programs of this size fill; 0 where not one fits."""
    limits = LIMITS[arch]
    if shared > limits.block_shared:
        return 0.0
    by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = limits.shared // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks) * warps / limits.warps


@dataclass(frozen=True)
class Row:
    """One case, compiled for one architecture."""

    op: str
    case: str
    arch: str
    hash: str  # of the sources that it depends on (offline.fingerprint)
    default: bool  # a default configuration
    warps: int
    registers: int  # a thread
    spill: int  # bytes of stack and local memory a thread
    shared: int  # bytes a program
    tensor: Mapping[str, int] = field(default_factory=dict)  # HMMA, HGMMA, …: how often each stands in the code

    @property
    def key(self) -> Key:
        return self.op, self.case, self.arch

    @property
    def occupancy(self) -> float:
        return occupancy(self.arch, self.warps, self.registers, self.shared)

    def faults(self) -> list[str]:
        """What is wrong with it by itself."""
        found = [f"a default configuration spills {self.spill} bytes a thread"] if self.default and self.spill else []
        if not self.occupancy:
            found.append(f"cannot be launched: {self.shared:,} bytes of shared memory, {self.registers} registers")
        return found

    def regressions(self, was: "Row") -> list[str]:
        """What is worse than in the report, of the same version of Triton."""
        found = []
        if self.spill > was.spill and not self.default:
            found.append(f"spills {self.spill} bytes a thread, {was.spill} in the report")
        if self.default and self.registers > MORE_REGISTERS * was.registers:
            found.append(f"takes {self.registers} registers, {was.registers} in the report")
        if lost := sorted(was.tensor.keys() - self.tensor.keys()):
            found.append(f"has no {', '.join(lost)} any more")
        return found

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "occupancy": round(self.occupancy, 3)}


@dataclass
class Report:
    """All rows, and the version of Triton that they are of (empty where there are none)."""

    triton: str = ""
    rows: dict[Key, Row] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """A line a row, so that a change of one kernel is one in the file."""
        lines = [json.dumps(self.rows[key].as_json()) for key in sorted(self.rows)]
        path.write_text(f'{{"triton": {json.dumps(self.triton)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def load(path: Path = REPORT) -> Report:
    """The report; an empty one where there is no file.

    Raises:
        ValueError: the file is no such report.
    """
    if not path.is_file():
        return Report()
    try:
        data = json.loads(path.read_text())
        rows = [Row(**{name: row[name] for name in (f.name for f in dataclasses.fields(Row))}) for row in data["rows"]]
        return Report(data["triton"], {row.key: row for row in rows})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of compiled kernels ({type(error).__name__}: {error})") from error


def judge(rows: Iterable[Row], report: Report, triton: str) -> list[str]:
    """What is wrong with the rows, a line each; held against the report where that is of the same version of Triton."""
    found = []
    for row in rows:
        was = report.rows.get(row.key) if report.triton == triton else None
        for what in row.faults() + (row.regressions(was) if was else []):
            found.append(f"{row.op} {row.case} {row.arch}: {what}")
    return found


def table(rows: Iterable[Row], report: Report, limit: int = 0) -> list[str]:
    """Lines, the worst first: what spills, then what fills least of a multiprocessor; `limit` rows, 0 all."""
    ordered = sorted(rows, key=lambda r: (-r.spill, r.occupancy, -r.registers, r.key))
    shown = ordered[:limit] if limit else ordered
    width = max((len(f"{r.op} {r.case}") for r in shown), default=0) + 1
    lines = [f"{'operation and case':<{width}} arch   spill regs warps  shared occupancy  tensor cores"]
    for row in shown:
        name = f"{row.op} {row.case}{'' if row.default else '*'}"
        tensor = ", ".join(f"{count} {what}" for what, count in sorted(row.tensor.items())) or "-"
        lines.append(
            f"{name:<{width}} {row.arch:<7}{row.spill:>5}{row.registers:>5}{row.warps:>6}{row.shared:>8}"
            f"{row.occupancy:>9.0%}   {tensor}{_change(row, report.rows.get(row.key))}"
        )
    if len(shown) < len(ordered):
        lines.append(f"… and {len(ordered) - len(shown)} more; --rows 0 shows all")
    lines.append("spill: bytes a thread; shared: bytes a program; *: not a default configuration")
    return lines


def _change(row: Row, was: Row | None) -> str:
    if was is None or (was.registers, was.spill, was.shared) == (row.registers, row.spill, row.shared):
        return ""
    return f"   was spill {was.spill}, regs {was.registers}, shared {was.shared}"
