"""The plots of a run, as PNG bytes: a roofline of all rows, and one picture an operation.

Knows the rows' columns and matplotlib; does not know how they were measured, or where files go.
"""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110
_COLOURS = (
    "#2f6db3",
    "#c9702c",
    "#3f8f4f",
    "#8a5aa8",
    "#b5533c",
    "#5b8f99",
    "#a08a2d",
    "#7a7a7a",
    "#c2508f",
    "#405070",
)


def plots(run: dict[str, Any]) -> dict[str, bytes]:
    """File name -> PNG."""
    device = run["environment"].get("device", "cpu")
    ops = list(dict.fromkeys(row["op"] for row in run["rows"]))
    found = {f"roofline-{device}.png": _png(_roofline(run, ops))}
    for op in ops:
        rows = [row for row in run["rows"] if row["op"] == op]
        found[f"{op}-{device}.png"] = _png(_shares(op, rows))
    return found


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


def _all_threads(run: dict[str, Any]) -> dict[str, float]:
    """The ceilings with the most threads: name -> 1e9 a second."""
    parts = [value for name, value in run["ceilings"].items() if name.startswith(("threads_", "device"))]
    return {name: value["median"] for name, value in parts[-1].items()} if parts else {}


def _roofline(run: dict[str, Any], ops: list[str]) -> "Figure":
    """GFLOP/s over FLOP a byte: filled is ours, hollow a peer; a round point had a warm cache, a square a cold one."""
    figure, axes = _figure(11, 6.5)
    rows, roofs = [row for row in run["rows"] if row["flops"]], _all_threads(run)  # copies compute nothing
    ops = [op for op in ops if any(row["op"] == op for row in rows)]
    intensities = [row["flops"] / row["bytes"] for row in rows] or [1.0]
    left, right = min(intensities) / 2, max(*intensities, 1000.0) * 2
    rates = {name.removesuffix("_gflops"): value for name, value in roofs.items() if name.endswith("_gflops")}
    bands = {name.removesuffix("_gbps"): value for name, value in roofs.items() if name.endswith("_gbps")}
    top = max(rates.values(), default=1.0)
    for name, rate in rates.items():
        axes.plot((left, right), (rate, rate), color="black", linewidth=0.9)
        axes.annotate(f"{name} {rate:.0f} GFLOP/s", (right, rate), ha="right", va="bottom", fontsize=8)
    for name, band in bands.items():
        axes.plot((left, top / band), (left * band, top), color="#777777", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{name.replace('_', ' ')} {band:.0f} GB/s",
            (left, left * band),
            (5, 1),
            textcoords="offset points",
            fontsize=7,
            color="#555555",
        )
    for op, colour in zip(ops, _COLOURS * len(ops), strict=False):
        for row in (row for row in rows if row["op"] == op):
            axes.plot(
                row["flops"] / row["bytes"],
                row["gflops"],
                marker="s" if row["cache"] == "cold" else "o",
                markersize=5,
                linestyle="",
                color=colour,
                markerfacecolor=colour if row["ours"] else "none",
            )
        axes.plot([], [], marker="o", linestyle="", color=colour, label=op)
    lowest = min((row["gflops"] for row in rows), default=1.0)
    title = "Roofline: filled ours, hollow peers; round warm, square cold"
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(lowest / 2, top * 1.6), title=title)
    axes.set(xlabel="FLOP a byte of the formula's inputs and outputs", ylabel="GFLOP/s")
    axes.grid(True, which="major", linewidth=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def _shares(op: str, rows: list[dict[str, Any]]) -> "Figure":
    """A bar a row: its share of the nearer ceiling, its time beside it."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = dict(zip(names, _COLOURS * len(names), strict=False))
    figure, axes = _figure(11, 1.2 + 0.2 * len(rows) + 0.1 * len({_case(row) for row in rows}))
    place, ticks = 0.0, []
    previous = None
    for row in reversed(rows):
        if _case(row) != previous:
            place, previous = place + 0.5, _case(row)
            ticks.append((place, previous))
        share = 100 * row["share_of_ceiling"]
        axes.barh(place, share, 0.9, color=colours[row["implementation"]], alpha=1.0 if row["ours"] else 0.55)
        ratio = "" if row["ratio_to_peer"] is None else f"  {row['ratio_to_peer']:.2f}x"
        text = f" {row['median_ms']:.4g} ms ±{row['spread']:.0%} of {row['ceiling']}{ratio}"
        axes.annotate(text, (share, place), va="center", fontsize=6)
        place += 1
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    widest = 100 * max(row["share_of_ceiling"] for row in rows)
    axes.set(
        xlim=(0, max(100.0, widest) * 1.25), ylim=(0, place + 0.5), xlabel="share of the nearer ceiling, %", title=op
    )
    axes.axvline(100, color="black", linewidth=0.6)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _case(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['cache']}"
