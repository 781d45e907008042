"""What a run on a GPU says of the aims: met, not met, or not measured; and its ceilings, as one page.

Knows the results' keys and the aims of docs/gpu/README.md; does not know how anything was measured. A ratio is that of
medians taken in turn in one process; an aim whose rows are not there is `not measured`, and never guessed.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
_FLOOR_MS = 0.43  # of an answer at 384 pixels and four tokens on an H200: its weights read once, its products at 790 TF


@dataclass(frozen=True)
class Results:
    """What a folder of results holds. lines: of kernels-<device>.jsonl."""

    state: dict[str, Any]
    lines: list[Row]
    answers: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return [line for line in self.lines if line.get("record") == "row"]

    @property
    def is_trial(self) -> bool:
        return bool(self.state["device"] == "cpu" or self.state.get("quick"))

    @property
    def ceilings(self) -> dict[str, Any]:
        found = (self.state["parts"].get("machine", {}).get("result") or {}).get("ceilings", {})
        return dict(found)

    @property
    def how(self) -> dict[str, str]:
        """What of a ceiling its figure does not say."""
        return dict((self.state["parts"].get("machine", {}).get("result") or {}).get("how", {}))

    def job(self, part: str, name: str) -> dict[str, Any]:
        found = (self.state["parts"].get(part, {}).get("result") or {}).get("jobs", {})
        return dict(found.get(name, {}).get("result") or {})


@dataclass(frozen=True)
class Aim:
    """value: what was measured, or None. It is met at `least` or more (at `most` or less where that is given)."""

    name: str
    value: Callable[[Results], float | None]
    least: float | None = None
    most: float | None = None

    def verdict(self, results: Results) -> tuple[str, str, str]:
        """(wanted, measured, verdict)."""
        wanted = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
        value = self.value(results)
        if value is None:
            return wanted, "", "not measured"
        if results.is_trial:
            return wanted, f"{value:.3g}", "not measured: a trial"
        met = value >= self.least if self.least is not None else value <= (self.most or 0.0)
        return wanted, f"{value:.3g}", "met" if met else "**not met**"


def against(op: str, shape: str, peers: Iterable[str] | None = None) -> Callable[[Results], float | None]:
    """How many times faster the fastest of ours is than the fastest of the peers (all where None), at such a shape."""

    def value(results: Results) -> float | None:
        rows = [r for r in results.rows if r["op"] == op and r["shape"].startswith(shape) and r["cache"] == "warm"]
        ours = [r["median_ms"] for r in rows if r["ours"]]
        named = None if peers is None else set(peers)
        others = [r["median_ms"] for r in rows if not r["ours"] and (named is None or r["implementation"] in named)]
        return min(others) / min(ours) if ours and others else None

    return value


def _of_copy(op: str) -> Callable[[Results], float | None]:
    """The share of the copying bandwidth that the fastest of ours reaches at the shape of the aims, its inputs in
    memory: what is still in a cache is compared with no bandwidth of memory's."""

    def value(results: Results) -> float | None:
        copy = results.ceilings.get("copy_gbps")
        cold = [r for r in results.rows if r["op"] == op and r["cache"] == "cold"]
        rows = [r for r in cold if "M=18464" in r["shape"] and r["ours"]]
        return max(r["gbps"] for r in rows) / copy if rows and isinstance(copy, float) else None

    return value


def _answer(results: Results, label: str, name: str) -> float | None:
    row = results.answers.get(label, {}).get("rows", {}).get(name)
    return None if row is None else float(row["ms"]["median"])


_ONE, _MANY, _GROUP = "base-384px-b1-q1-t4", "base-384px-b32-q1-t4", "base-384px-b1-q64-t4"


def _faster(label: str, peer: str) -> Callable[[Results], float | None]:
    """How many times faster ours is, round by round: peers may have been measured in several processes."""

    def value(results: Results) -> float | None:
        found = results.answers.get(label, {}).get("ratios", {}).get(peer)
        return None if found is None else float(found["median"])

    return value


def _of_floor(results: Results) -> float | None:
    mine = _answer(results, _ONE, "miss-bf16")
    return mine / _FLOOR_MS if mine else None


def _reuse(results: Results) -> float | None:
    one, many = (_answer(results, label, "miss-bf16") for label in (_ONE, _GROUP))
    return 64 * one / many if one and many else None


def _of_roofline(results: Results) -> float | None:
    """133 GFLOP an answer of 384 pixels, at the bfloat16 rate measured on the machine."""
    mine, rate = _answer(results, _MANY, "miss-bf16"), results.ceilings.get("bf16_tflops")
    return 32 * 0.133 / (mine / 1e3) / rate if mine and isinstance(rate, float) else None


def _step(results: Results) -> float | None:
    modes = results.job("finetune", "rows").get("modes", {})
    ratios = [mode["ratio"] for mode in modes.values()]
    return statistics.median(ratios) if ratios else None


def _memory(results: Results) -> float | None:
    found = results.job("kernels", "memory").get("contrastive")
    if not isinstance(found, dict):
        return None
    ours, eager = found.get("triton"), found.get("torch")
    return ours / eager if isinstance(ours, int) and isinstance(eager, int) and eager > 0 else None


_VIT = "vit B=32 T={} H=12 D=64"
AIMS = (
    Aim("attention, 577 tokens, forward, of the best peer", against("attention", _VIT.format(577)), 1.3),
    Aim("attention, 197 tokens, forward, of the best peer", against("attention", _VIT.format(197)), 1.5),
    Aim("attention, 901 tokens, forward, of the best peer", against("attention", _VIT.format(901)), 0.97),
    Aim(
        "attention, 577 tokens, with gradient, of the best peer",
        against("attention", "forward+backward " + _VIT.format(577)),
        1.3,
    ),
    Aim(
        "attention, 197 tokens, with gradient, of the best peer",
        against("attention", "forward+backward " + _VIT.format(197)),
        1.5,
    ),
    Aim(
        "text attention, 240 questions, padded, with gradient, of SDPA",
        against("attention", "forward+backward padded bert B=240", ["sdpa"]),
        3.0,
    ),
    Aim(
        "64 questions an image, of SDPA on repeated keys",
        against("cross_attention", "64 x 20 over 1 x 577", ["sdpa_repeated"]),
        6.0,
    ),
    Aim(
        "one question an image, of SDPA on repeated keys",
        against("cross_attention", "1 x 20 over 1 x 577", ["sdpa_repeated"]),
        2.0,
    ),
    Aim("cross entropy, with gradient, of Liger", against("linear_cross_entropy", "forward+backward", ["liger"]), 2.0),
    Aim(
        "cross entropy, with gradient, of compiled PyTorch",
        against("linear_cross_entropy", "forward+backward", ["compiled"]),
        1.2,
    ),
    Aim(
        "contrastive, with gradient, of eager", against("contrastive", "forward+backward B=80 Q=57600", ["torch"]), 5.0
    ),
    Aim("layer norm, share of copying", _of_copy("layer_norm"), 0.8),
    Aim("layer norm's gradient, share of copying", _of_copy("layer_norm_backward"), 0.75),
    Aim("one answer, of Hugging Face eager", _faster(_ONE, "hf-bf16"), 10.0),
    Aim("one answer, of Hugging Face compiled", _faster(_ONE, "hf-compiled-bf16"), 2.5),
    Aim("one answer, in floors of an H200 (0.43 ms)", _of_floor, most=3.0),
    Aim("one answer, with graphs, of ours without", _faster(_ONE, "miss-nographs-bf16"), 1.0),
    Aim("32 answers, share of the bf16 rate", _of_roofline, 0.6),
    Aim("32 answers, of Hugging Face with SDPA", _faster(_MANY, "hf-sdpa-bf16"), 2.5),
    Aim("64 questions an image, of asked apart", _reuse, 12.0),
    Aim("finetuning step, of PyTorch's rows (bf16, SDPA)", _step, 2.0),
    Aim("contrastive, with gradient, share of eager's memory", _memory, most=0.05),
)


def page(results: Results, date: str) -> str:
    """Markdown: what ran, the ceilings, the aims, and where ours loses."""
    state, environment = results.state, results.state["environment"]
    gpu = environment.get("gpu") or f"CPU {environment.get('processor')}: a trial, not a GPU"
    versions = ", ".join(f"{name} {environment.get(name)}" for name in ("torch", "triton", "python"))
    lines = [
        "# Run on a GPU" if environment.get("gpu") else "# Trial without a GPU",
        f"\nWritten by `miss bench merge`. {gpu}; {versions}; sources {state['source']}, "
        f"commit {state.get('commit') or 'unknown'}; merged {date}.\n",
        "## Parts\n\n| part | how it ended | seconds |\n|---|---|---|",
    ]
    lines += [f"| {name} | {p['status']} | {p.get('seconds', '')} |" for name, p in state["parts"].items()]
    lines.append("\n## Ceilings\n\n| ceiling | measured |\n|---|---|")
    how = results.how
    lines += [f"| {name} | {value} {how.get(name, '')}".rstrip() + " |" for name, value in results.ceilings.items()]
    lines.append("\n## Aims\n\n| aim | wanted | measured | |\n|---|---|---|---|")
    lines += [f"| {aim.name} | {' | '.join(aim.verdict(results))} |" for aim in AIMS]
    return "\n".join([*lines, *_evidence(state), *_slower(results.rows)]) + "\n"


def _evidence(state: dict[str, Any]) -> list[str]:
    found = state["parts"].get("evidence", {}).get("result")
    if not found:
        return ["\n## Evidence\n\nNone was made."]
    lines = [f"\n## Evidence\n\n{found['records']} records, {found['correct_and_faster']} correct and faster.\n"]
    for title in ("wrong", "failed", "nowhere_faster"):
        lines += [f"- {title.replace('_', ' ')}: {one}" for one in found[title]]
    return lines


def _slower(rows: list[Row]) -> list[str]:
    """The cases in which the fastest of ours is slower than the best peer, the worst first."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["shape"], row["dtype"], row["cache"]), []).append(row)
    losing = []
    for key, group in cases.items():
        ours = min((r["median_ms"] for r in group if r["ours"]), default=None)
        best = min((r for r in group if not r["ours"]), key=lambda r: r["median_ms"], default=None)
        if ours and best and best["median_ms"] < ours:
            losing.append((best["median_ms"] / ours, f"{' '.join(key)}: {best['implementation']}"))
    lines = [f"\n## Where ours loses\n\n{len(losing)} of {len(cases)} cases.\n"] if cases else []
    return lines + [f"- {ratio:.2f}x of {text}" for ratio, text in sorted(losing)[:40]]
