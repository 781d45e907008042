"""How far a run of many cases came, so that the next goes on: what is done, what ended its process, what time cut off.

Knows the entries of a run's file; does not know cases, clocks or devices. Imports no torch.

An entry is written before its case is measured (`begun`) and again after it: `done`; `lost`, the CUDA context went with
it; `cut`, time ended the run politely. One that is `begun` when the next run starts has hung or killed its process: it
is `died`, recorded as refused and, as what is done or lost, not measured again. What is cut twice takes longer than
there ever is, and is given up too.
"""

from typing import Any

LATE = "the time was over"  # a case that was not begun: what the next run goes on with
AGAIN = 75  # exit code of a command that, started again, goes on behind what ended it
_NAME = ("op", "shape", "dtype", "cache")
_MOST_CUTS = 2


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in _NAME)


def note(entries: list[dict[str, Any]], name: dict[str, Any], how: str) -> None:
    """Writes how far a case came, in place of what was said of it before."""
    before = next((e for e in entries if key(e) == key(name)), None)
    cuts = (before or {}).get("cuts", 0) + (how == "cut")
    fresh = {**{n: name[n] for n in _NAME}, "how": how, "cuts": cuts}
    entries[:] = [*(e for e in entries if e is not before), fresh]


def settled(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives up what is not to be begun once more, in place; what is to be said of each, as refused."""
    refused = []
    for entry in entries:
        cut = entry["how"] == "cut" and entry["cuts"] >= _MOST_CUTS
        if entry["how"] != "begun" and not cut:
            continue
        entry["how"] = "died"
        reason = f"cut off by the time {entry['cuts']} times" if cut else "its process hung or died at it"
        name = {n: entry[n] for n in _NAME}
        refused.append({**name, "implementation": "all", "ours": True, "reason": reason})
    return refused


def over(entries: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """The keys of what is not measured again."""
    return {key(entry) for entry in entries if entry["how"] in ("done", "lost", "died")}
