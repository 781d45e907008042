"""How good captions are: fidelity to their labels, variety, what was rejected, speed.

Knows records of a run; does not know writers or files.

Fidelity is the cleaner's own word: of all that a writer wrote, how much stated every label, how much stated nothing
else, how much did both. What is kept is faithful by the same word, so the figure says how often a writer can be used as
it is, not how often the cleaner errs.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from miss.engine.transcap.vocabulary import words

OF_FORM = ("short", "long", "form", "repeats", "unfinished", "same")
Record = dict[str, Any]


def measure(records: Sequence[Record], seconds: float, writer: str) -> Record:
    """Figures of a run's records, as they stand in `sets.jsonl`."""
    rejected = [r["why"] for record in records for r in record["rejected"]]
    num_candidates = sum(record["candidates"] for record in records)
    kept = [c for record in records for c in record["captions"]]
    own = [c for c in kept if not c.get("filled")]
    rules = [{why.split(":")[0] for why in reasons} for reasons in rejected]
    missing = sum("missing" in found for found in rules)
    unsupported = sum(bool(found - {*OF_FORM, "missing"}) for found in rules)
    unfaithful = sum(bool(found - {*OF_FORM}) for found in rules)
    texts = [c["text"] for c in own]
    total = Counter[str]()
    for record in records:
        total.update(record["tokens"])
    return {
        "candidates": num_candidates,
        "kept": len(own),
        "filled": len(kept) - len(own),
        "sets_without_own": sum(not any(not c.get("filled") for c in r["captions"]) for r in records),
        "rejected": len(rejected),
        "rejected_share": _share(len(rejected), num_candidates),
        "fidelity": {
            "states_every_label": _share(num_candidates - missing, num_candidates),
            "states_nothing_else": _share(num_candidates - unsupported, num_candidates),
            "faithful": _share(num_candidates - unfaithful, num_candidates),
        },
        "rejected_by_rule": dict(Counter(rule for found in rules for rule in found).most_common()),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": self_bleu([[c["text"] for c in r["captions"] if not c.get("filled")] for r in records]),
        "seconds": round(seconds, 2),
        "captions_per_second": round(len(own) / seconds, 3) if seconds else None,
        "candidates_per_second": round(num_candidates / seconds, 3) if seconds else None,
        "tokens": dict(total),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words over all n-grams of all texts; None where there are none."""
    found = [gram for text in texts for gram in _grams(words(text), n)]
    return round(len(set(found)) / len(found), 4) if found else None


def self_bleu(groups: Sequence[Sequence[str]]) -> float | None:
    """Mean BLEU-4 of every text against the others of its group, 0 to 1: high where a group's texts are alike."""
    tokens = [[words(text) for text in group] for group in groups if len(group) > 1]
    found = [bleu(text, [*group[:i], *group[i + 1 :]]) for group in tokens for i, text in enumerate(group)]
    return round(sum(found) / len(found), 4) if found else None


def bleu(text: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """Sentence BLEU, 0 to 1: up to 4-grams, as far as the text has any; an order without a match counts 1/2, the next
    1/4 of a match and so on (sacreBLEU's "exp" with effective order)."""
    logs, smooth = [], 1.0
    for n in range(1, 5):
        grams = Counter(_grams(text, n))
        total = sum(grams.values())
        if not total:
            break
        most = Counter[tuple[str, ...]]()
        for other in others:
            most |= Counter(_grams(other, n))
        matches = float(sum((grams & most).values()))
        if not matches:
            if n == 1:
                return 0.0
            smooth *= 2
            matches = 1 / smooth
        logs.append(math.log(matches / total))
    if not logs:
        return 0.0
    nearest = min((abs(len(other) - len(text)), len(other)) for other in others)[1]
    return math.exp(min(0.0, 1 - nearest / len(text)) + sum(logs) / len(logs))


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
