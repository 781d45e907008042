"""Pictures of whole answers, as PNG bytes: stages, throughput, accuracy against latency, and what grows with what.

Knows the results' keys and matplotlib; does not know how they were measured, or where files go.
"""

from collections.abc import Callable
from typing import Any

from miss.benchmarks.plots import _COLOURS, _figure, _png

Result = dict[str, Any]
_STAGES = {"image": "#2f6db3", "question": "#3f8f4f", "decode": "#c9702c"}


def plots(results: list[Result]) -> dict[str, bytes]:
    """File name -> PNG; a picture of a growing quantity only where it was measured at two places."""
    found = {f"answer-stages-{r['setting']['label']}.png": _stages(r) for r in results}
    for preset in dict.fromkeys(r["setting"]["preset"] for r in results):
        mine = [r for r in results if r["setting"]["preset"] == preset]
        found |= {f"answer-accuracy-{preset}.png": _accuracy(r) for r in mine[:1] if r["answers"]}
        for name, (along, title, value) in _CURVES.items():
            lines = _lines(mine, along, value)
            if lines:
                found[f"answer-{name}-{preset}.png"] = _curve(lines, along.replace("_", " "), title)
    return found


def _stages(result: Result) -> bytes:
    """Stacked bars of the stages' medians, and what is left to the total."""
    rows = dict(sorted(result["rows"].items(), key=lambda item: -item[1]["ms"]["median"]))
    figure, axes = _figure(9, 1.2 + 0.35 * len(rows))
    left = [0.0] * len(rows)
    for stage, colour in _STAGES.items():
        values = [row["stages"][stage]["median"] for row in rows.values()]
        axes.barh(list(rows), values, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, values, strict=True)]
    totals = [row["ms"]["median"] for row in rows.values()]
    axes.barh(list(rows), [max(0.0, t - a) for t, a in zip(totals, left, strict=True)], left=left, color="#bbbbbb")
    for place, total in enumerate(totals):
        axes.annotate(f" {total:.0f}", (total, place), va="center", fontsize=8)
    axes.set_xlabel(f"ms, {result['setting']['label']}")
    axes.legend(fontsize=8, loc="lower right")
    return _png(figure)


def _accuracy(result: Result) -> bytes:
    """Accuracy on SLAKE of the shipped checkpoint over this setting's latency."""
    figure, axes = _figure(8, 5)
    for colour, (name, row) in zip(_COLOURS * 3, result["rows"].items(), strict=False):
        judged = result["answers"].get(name, {})
        if "accuracy" in judged:
            place = (row["ms"]["median"], 100 * judged["accuracy"])
            axes.plot(*place, marker="o" if row["ours"] else "s", color=colour)
            axes.annotate(f" {name}", place, fontsize=8, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel(f"ms, {result['setting']['label']}")
    axes.set_ylabel("accuracy of miss-small on SLAKE validation, %")
    return _png(figure)


def _per_second(result: Result, row: dict[str, Any]) -> float:
    setting = result["setting"]
    return 1e3 * setting["batch"] * setting["questions_per_image"] / row["ms"]["median"]


def _each(result: Result, row: dict[str, Any]) -> float:
    return 1e3 / _per_second(result, row)


Value = Callable[[Result, dict[str, Any]], float]
_CURVES: dict[str, tuple[str, str, Value]] = {
    "throughput": ("batch", "answers a second", _per_second),
    "questions": ("questions_per_image", "ms an answer", _each),
    "image-size": ("image_size", "ms an answer", _each),
    "tokens": ("tokens", "ms an answer", _each),
}
_ALONG = ("image_size", "batch", "questions_per_image", "tokens")


def _lines(results: list[Result], along: str, value: Value) -> dict[str, list[tuple[float, float]]]:
    """A line a peer, of the settings that differ in `along` alone: those that share the most."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result["setting"][n] for n in _ALONG if n != along), []).append(result)
    most = max(groups.values(), key=len, default=[])
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in most:
        for name, row in result["rows"].items():
            lines.setdefault(name, []).append((result["setting"][along], value(result, row)))
    return {name: points for name, points in lines.items() if len(points) > 1}


def _curve(lines: dict[str, list[tuple[float, float]]], x: str, y: str) -> bytes:
    figure, axes = _figure(8, 5)
    for colour, (name, points) in zip(_COLOURS * 3, lines.items(), strict=False):
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o" if name.startswith("miss") else "s", color=colour, label=name
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=7)
    return _png(figure)
