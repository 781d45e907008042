"""Two answerers on the same questions: how many answers are the same, and whether one is right less often.

Knows answers as text and token ids, and the truth; does not know models, precisions or how a model was packed.
"""

from collections.abc import Sequence
from typing import Any

from miss.engine.data.samples import Sample
from miss.engine.evaluation.metrics import mcnemar_exact
from miss.engine.evaluation.protocols import normalise

NEAR_TIE = 1e-2  # of log-probability between the two best tokens


def compared(
    samples: Sequence[Sample],
    parent: Sequence[tuple[str, list[int]]],
    child: Sequence[tuple[str, list[int]]],
    gaps: Sequence[float],
) -> dict[str, Any]:
    """Agreement, exact match of both, and McNemar's exact test, over all and by data set.

    Args:
        parent, child: (text, token ids) of each sample's answer.
        gaps: for each answer that changed, in order, what the parent's log-probability of its own token lies above
            that of the child's, where the two part.
    """
    table = {"all": _row(samples, parent, child)}
    for dataset in sorted({sample.dataset for sample in samples}):
        chosen = [i for i, sample in enumerate(samples) if sample.dataset == dataset]
        table[dataset] = _row([samples[i] for i in chosen], [parent[i] for i in chosen], [child[i] for i in chosen])
    changed = [i for i in range(len(samples)) if parent[i][1] != child[i][1]]
    examples = [
        {"qid": samples[i].qid, "parent": parent[i][0], "packed": child[i][0], "gap": float(f"{gap:.3g}")}
        for i, gap in zip(changed, gaps, strict=True)
    ]
    return {"near_ties": sum(gap < NEAR_TIE for gap in gaps), "table": table, "changed": examples}


def _row(
    samples: Sequence[Sample], parent: Sequence[tuple[str, list[int]]], child: Sequence[tuple[str, list[int]]]
) -> dict[str, Any]:
    right = [
        [normalise(text) == normalise(sample.answer) for (text, _), sample in zip(answers, samples, strict=True)]
        for answers in (parent, child)
    ]
    only_parent, only_child, p_value = mcnemar_exact(*right)
    return {
        "questions": len(samples),
        "same": sum(a[1] == b[1] for a, b in zip(parent, child, strict=True)),
        "parent_right": sum(right[0]),
        "right": sum(right[1]),
        "only_parent_right": only_parent,
        "only_this_right": only_child,
        "mcnemar_p": p_value,
    }


def card_section(scheme: str, report: dict[str, Any]) -> str:
    """The report in Markdown: size, answers, what became of the layers."""
    before, after = report["bytes_before"], report["bytes_after"]
    forms = ", ".join(f"{count} {form}" for form, count in report["forms"].items())
    lines = [
        HEADING,
        f"Scheme {scheme}: {after / 1e6:.1f} MB of tensors, from {before / 1e6:.1f} MB in float32. Linear "
        f"layers: {forms}; calibrated on {report['calibration_rows']} questions.",
        "",
    ]
    if "gate" in report:
        lines += _answers(report) + [""]
    lines += ["Relative error of a layer's outputs (of its weights, where nothing was calibrated), the worst ten:", ""]
    lines += ["| layer | form | error | smoothing alpha |", "|---|---|---|---|"]
    worst = sorted(report["layers"].items(), key=lambda item: -item[1]["error"])[:10]
    lines += [f"| {n} | {row['form']} | {row['error']:.3g} | {row.get('alpha', '')} |" for n, row in worst]
    return "\n".join(lines) + "\n"


HEADING = "## How it was packed"


def _answers(report: dict[str, Any]) -> list[str]:
    gate, compared = report["gate"], report["answers"]
    lines = [
        "Greedy answers against the float32 parent's, exact match by the normaliser of "
        "`engine/evaluation/protocols.py`:",
        "",
        "| questions | as the parent's | parent right | this right | only parent / only this right | McNemar p |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in compared["table"].items():
        share, total = 100 * row["same"] / max(row["questions"], 1), row["questions"]
        lines.append(
            f"| {name}: {total:,} | {row['same']:,} ({share:.2f} %) | {row['parent_right']:,} | {row['right']:,} | "
            f"{row['only_parent_right']} / {row['only_this_right']} | {row['mcnemar_p']:.3g} |"
        )
    outcome = "passed" if gate["passed"] else f"not passed ({'; '.join(gate['why'])})"
    return [
        *lines,
        "",
        f"Near ties (the parent's two best tokens within {NEAR_TIE}) among the changed: {compared['near_ties']}. "
        f"The agreement gate: **{outcome}**.",
    ]


def with_section(card: str, section: str) -> str:
    """A card with the section at its end, in place of an older one."""
    start = card.find(HEADING)
    if start < 0:
        return card.rstrip() + "\n\n" + section
    end = card.find("\n## ", start + 1)
    return card[:start] + section + (card[end:] if end >= 0 else "")
