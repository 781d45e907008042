"""What a server under load measured, as a table in Markdown, plots, and files.

Knows the result's keys and matplotlib; does not know how anything was measured.
"""

import json
from pathlib import Path
from typing import Any

from miss.benchmarks.plots import _COLOURS, _figure, _png

Result = dict[str, Any]


def table(result: Result) -> str:
    """Markdown: answers, one request at a time, the closed loop, its ratios, the sweeps; what was not measured is left
    out."""
    lines = _head(result)
    for name, part in {"single": _single, "closed": _closed, "ratios": _ratios, "open": _open}.items():
        if result[name]:
            lines += part(result)
    return "\n".join([*lines, ""])


def _head(result: Result) -> list[str]:
    answers, place = result["answers"], result["environment"]
    equal = ", ".join(f"{name} {count}" for name, count in answers["equal"].items())
    settings = (f"{n}: `{' '.join(s['flags']) or 'defaults'}`" for n, s in result["servers"].items() if not s["ours"])
    return [
        f"# {result['checkpoint']} behind HTTP",
        "",
        f"Written by `miss bench serve`; {place['processor']}, {place['cores']} cores, {place['threads']} threads.",
        *(f"Left out: {name}: {reason}" for name, reason in result["failed"].items()),
        f"Peers' settings: {'; '.join(settings) or 'none'}.",
        f"Of {answers['questions']} questions answered as by {answers['reference']}: {equal}.",
    ]


def _single(result: Result) -> list[str]:
    lines = [
        "",
        "## One request at a time, against the engine alone",
        "",
        "| precision | image | p50 | p50 | p50 / p50 |",
    ]
    lines += ["|---|---|---|---|---|"]
    for precision, cells in result["single"].items():
        for name, found in cells.items():
            image = "seen before" if name.endswith("warm") else "new"
            http, inside = found["http_ms"]["p50"], found["engine_ms"]["p50"]
            lines.append(
                f"| {precision} | {image} | {http:.1f} ms HTTP | {inside:.1f} ms alone | {found['ratio_p50']:.3f} |"
            )
    return lines


def _closed(result: Result) -> list[str]:
    lines = [
        "",
        "## Closed loop, questions a second",
        "",
        "| server | cell | median | least | most |",
        "|---|---|---|---|---|",
    ]
    for server, cells in result["closed"].items():
        for name, found in cells.items():
            q = found["questions_per_s"]
            lines.append(f"| {server} | {name} | {q['median']:.2f} | {q['min']:.2f} | {q['max']:.2f} |")
    return lines


def _ratios(result: Result) -> list[str]:
    lines = ["", "## Ratios, round by round", ""]
    found = result["ratios"].items()
    return lines + [f"- {name}: {r['median']:.2f}x ({r['min']:.2f}-{r['max']:.2f})" for name, r in found]


def _open(result: Result) -> list[str]:
    lines = [
        *("", f"## Open loop, goodput within {result['limit']:g} s of being due", ""),
        "| server | cell | offered/s | goodput/s | answered | total p50/p90/p99 | queue | image | question | decode |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for server, cells in result["open"].items():
        for name, sweep in cells.items():
            lines += [_line(server, name, found) for found in sweep["points"]]
    return lines


def _line(server: str, cell: str, found: dict[str, Any]) -> str:
    def three(name: str) -> str:
        values = found["ms"].get(name)
        return "" if values is None else "/".join(f"{values[share]:.0f}" for share in ("p50", "p90", "p99"))

    times = " | ".join(three(name) for name in ("total", "queue", "image", "question", "decode"))
    counts = f"{found['offered']:.2f} | {found['goodput']:.2f} | {found['answered']}/{found['visits']}"
    return f"| {server} | {cell} | {counts} | {times} |"


def plots(result: Result) -> dict[str, bytes]:
    """File name -> PNG: goodput and p99 over the offered rate, for each mix."""
    found = {}
    for mix in ("many", "unique"):
        curves = {
            f"{server} {cell}": sweep["points"]
            for server, cells in result["open"].items()
            for cell, sweep in cells.items()
            if cell.startswith(mix)
        }
        if curves:
            found[f"serve-{mix}-goodput.png"] = _curves(curves, "goodput", result["limit"])
            found[f"serve-{mix}-latency.png"] = _curves(curves, "p99", result["limit"])
    return found


def _curves(curves: dict[str, list[dict[str, Any]]], what: str, limit: float) -> bytes:
    figure, axes = _figure(8, 5)
    for colour, (name, points) in zip(_COLOURS * 3, curves.items(), strict=False):
        values = [p["goodput"] if what == "goodput" else p["ms"]["total"]["p99"] for p in points]
        axes.plot([p["offered"] for p in points], values, marker="o", color=colour, label=name)
    axes.set_xlabel("visits offered a second")
    axes.set_ylabel(f"answered within {limit:g} s, a second" if what == "goodput" else "p99 from being due, ms")
    axes.set_xscale("log")
    axes.set_yscale("log" if what == "p99" else "symlog")  # a goodput may be 0
    axes.legend(fontsize=8)
    return _png(figure)


def write(folder: Path, result: Result, draw: bool) -> list[Path]:
    """serve.json, serve.md and the plots, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"serve.json": (json.dumps(result) + "\n").encode(), "serve.md": table(result).encode()}
    files |= plots(result) if draw else {}
    for name, data in files.items():
        temporary = folder / f".{name}.new"
        temporary.write_bytes(data)
        temporary.replace(folder / name)
    return [folder / name for name in files]
