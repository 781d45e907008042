"""Whether a packed form may be what a checkpoint runs as: the agreement gate, and its verdict in words.

Knows counts of answers; does not know how they came about.
"""

from collections.abc import Mapping
from typing import Any

AGREEMENT = 0.99  # of the parent's answers, at least
POINTS = 0.3  # of exact match, lost at most
QUESTIONS = 1000  # fewer say too little


def judged(questions: int, same: int, parent_right: int, right: int) -> dict[str, Any]:
    """What the report says of the gate.

    Args:
        same: answers equal to the parent's, token for token. parent_right, right: answers that were right.
    """
    agreement, lost = same / max(questions, 1), 100 * (parent_right - right) / max(questions, 1)
    reasons = []
    if questions < QUESTIONS:
        reasons.append(f"{questions} questions were compared; wanted at least {QUESTIONS}")
    if agreement < AGREEMENT:
        reasons.append(
            f"{100 * agreement:.2f} % of the answers are the parent's; wanted at least {100 * AGREEMENT:g} %"
        )
    if lost > POINTS:
        reasons.append(f"{lost:.2f} points of exact match lost; wanted at most {POINTS}")
    return {"passed": not reasons, "questions": questions, "agreement": agreement, "points_lost": lost, "why": reasons}


def verdict(report: Mapping[str, Any]) -> tuple[bool, str]:
    """(passed, why not) of a checkpoint's quantization report; one that was never judged has not passed."""
    gate = report.get("gate")
    if not isinstance(gate, Mapping):
        return False, "its answers were never compared with its parent's (`miss quantize --dataset …` does)"
    return gate.get("passed") is True, "; ".join(map(str, gate.get("why", [])))
