"""The plots of a report, as PNG bytes, from the metrics of an evaluation.

Knows the metrics' layout and matplotlib; does not know samples, models or where files go.
"""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = ("accuracy.png", "breakdown.png", "reliability.png", "risk_coverage.png")
_COLOURS = {"answers": "#2f6db3", "blank": "#9a9a9a", "shuffled": "#c9a227", "question_only": "#b5533c"}
_DPI = 110


def plots(metrics: dict[str, Any]) -> dict[str, bytes]:
    """File name -> PNG. A plot without anything to show (no scores, no shown cells) is left out."""
    found = {"accuracy.png": _accuracy(metrics)} if metrics["n"] else {}
    if any(part["cells"] for part in metrics["breakdown"].values()):
        found["breakdown.png"] = _breakdown(metrics)
    if "reliability" in metrics["calibration"]:
        found["reliability.png"] = _reliability(metrics["calibration"])
        found["risk_coverage.png"] = _risk_coverage(metrics["calibration"])
    return {name: _png(figure) for name, figure in found.items()}


def _figure(width: float, height: float) -> tuple["Figure", Any]:
    # Not pyplot: no global state, no display, no back end to choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bounds(figure: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches below and above the figure, in percent; NaN (nothing is drawn) without one."""
    value, interval = figure["accuracy"], figure["ci95"]
    if interval is None:
        return float("nan"), float("nan")
    return 100 * max(0.0, value - interval[0]), 100 * max(0.0, interval[1] - value)


def runs(metrics: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The answers and the baselines that ran, by name."""
    yield "answers", metrics
    for name, run in metrics["baselines"].items():
        if isinstance(run, dict) and "overall" in run:
            yield name, run


def _accuracy(metrics: dict[str, Any]) -> "Figure":
    figure, axes = _figure(7, 3.6)
    parts = [part for part in ("overall", "open", "closed") if metrics[part]["n"]]
    shown = list(runs(metrics))
    width = 0.8 / len(shown)
    for i, (name, run) in enumerate(shown):
        places = [p + (i - (len(shown) - 1) / 2) * width for p in range(len(parts))]
        heights = [100 * run[part]["accuracy"] for part in parts]
        below, above = zip(*(_bounds(run[part]) for part in parts), strict=True)
        label = name.replace("_", " ")
        axes.bar(places, heights, width, yerr=(below, above), capsize=3, color=_COLOURS.get(name), label=label)
    axes.set_xticks(range(len(parts)), [f"{part} (n = {metrics[part]['n']})" for part in parts])
    axes.set(
        ylim=(0, 100),
        ylabel="exact match, %",
        title=f"{metrics['dataset']} {metrics['split']}: accuracy, 95 % interval",
    )
    axes.legend()
    return figure


def _breakdown(metrics: dict[str, Any]) -> "Figure":
    bars = [
        (f"{dimension.replace('_', ' ')}: {cell} (n = {found['n']})", found)
        for dimension, part in metrics["breakdown"].items()
        for cell, found in part["cells"].items()
    ][::-1]
    figure, axes = _figure(8, 1.2 + 0.24 * len(bars))
    below, above = zip(*(_bounds(found) for _, found in bars), strict=True)
    values = [100 * found["accuracy"] for _, found in bars]
    axes.barh(range(len(bars)), values, xerr=(below, above), capsize=2, color=_COLOURS["answers"])
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set(xlim=(0, 100), xlabel="exact match, %", ylim=(-0.6, len(bars) - 0.4))
    if metrics["overall"]["n"]:
        axes.axvline(100 * metrics["overall"]["accuracy"], color="black", linewidth=0.8, linestyle=":")
    return figure


def _reliability(calibration: dict[str, Any]) -> "Figure":
    figure, axes = _figure(4.6, 4.2)
    bins = [b for b in calibration["reliability"] if b["n"]]
    width = bins[0]["high"] - bins[0]["low"]
    axes.bar(
        [b["low"] for b in bins], [b["accuracy"] for b in bins], width, align="edge", color="#a9c4e4", edgecolor="white"
    )
    sizes = [8 + 100 * b["n"] / calibration["n"] for b in bins]
    axes.scatter(
        [b["score"] for b in bins],
        [b["accuracy"] for b in bins],
        sizes,
        color=_COLOURS["answers"],
        zorder=3,
        clip_on=False,
    )
    axes.plot((0, 1), (0, 1), color="black", linewidth=0.8, linestyle="--")
    ece = calibration["ece_equal_width"]["value"]
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="accuracy", title=f"reliability (ECE {ece:.3f})")
    return figure


def _risk_coverage(calibration: dict[str, Any]) -> "Figure":
    figure, axes = _figure(4.6, 4.2)
    coverage, risk = zip(*calibration["risk_coverage"], strict=True)
    axes.plot(coverage, risk, color=_COLOURS["answers"])
    axes.axhline(risk[-1], color="black", linewidth=0.8, linestyle=":")
    title = f"risk against coverage (AURC {calibration['aurc']['value']:.3f})"
    axes.set(
        xlim=(0, 1), ylim=(0, max(0.05, 1.05 * max(risk))), xlabel="coverage", ylabel="risk (share wrong)", title=title
    )
    return figure
