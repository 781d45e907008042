"""Runs side by side, and examples of what they kept and rejected, as Markdown.

Knows reports and records of runs; does not know how they came about.
"""

import random
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
COLUMNS = [
    *(
        "labels",
        "writer",
        "prompt",
        "label sets",
        "candidates",
        "states every label",
        "states nothing else",
        "faithful",
    ),
    *("rejected", "kept", "filled", "sets without own", "distinct-1", "distinct-2", "self-BLEU", "captions/s"),
]


def row(labels: str, report: Record) -> list[str]:
    """A report as a row below COLUMNS."""
    fidelity, settings = report["fidelity"], report["settings"]
    shares = [fidelity[key] for key in ("states_every_label", "states_nothing_else", "faithful")]
    counts = [report[key] for key in ("kept", "filled", "sets_without_own")]
    return [
        labels,
        settings["writer"],
        settings.get("prompt", "-"),
        str(report["label_sets"]),
        str(report["candidates"]),
        *(percent(share) for share in (*shares, report["rejected_share"])),
        *map(str, counts),
        *("-" if report[key] is None else f"{report[key]:.3f}" for key in ("distinct_1", "distinct_2", "self_bleu")),
        "-" if report["captions_per_second"] is None else f"{report['captions_per_second']:.3g}",
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def markdown(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def examples(runs: Sequence[tuple[str, Sequence[Record]]], count: int, seed: int) -> str:
    """`count` kept and `count` rejected captions, drawn by the seed from all runs of a language model.

    Args:
        runs: (name of the run, its records).
    """
    kept, rejected = [], []
    for name, records in runs:
        for record in records:
            facts = "; ".join(f"{key}: {value}" for key, value in record["facts"])
            kept += [[name, facts, c["text"], _score(c)] for c in record["captions"] if not c.get("filled")]
            rejected += [[name, facts, _short(c["text"]), "; ".join(c["why"][:3])] for c in record["rejected"]]
    draw = random.Random(seed)
    tables = []
    for title, found, last in (("Kept", kept, "score"), ("Rejected", rejected, "why")):
        chosen = draw.sample(found, min(count, len(found)))
        columns = ("run", "labels", "caption", last)
        tables.append(f"### {title}: {len(chosen)} of {len(found):,}\n\n{markdown(chosen, columns)}")
    return "\n".join(tables)


def _score(caption: Record) -> str:
    return "-" if caption["score"] is None else f"{caption['score']:.2f}"


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:159] + "…"
