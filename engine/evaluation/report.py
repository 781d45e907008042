"""The report of an evaluation: Markdown tables, and the files that hold metrics, predictions, report and plots.

Knows the layout of the metrics; does not know samples, models or how a figure came about.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from miss.engine.evaluation.breakdown import MIN_CELL
from miss.engine.evaluation.files import write_files
from miss.engine.evaluation.plots import PLOTS, plots, runs
from miss.engine.evaluation.runner import Evaluation

_PARTS = ("overall", "open", "closed")


def percent(figure: dict[str, Any], name: str = "accuracy") -> str:
    """`78.3 % [75.1, 81.2]`; n/a where no row is behind the figure, no interval where there is none."""
    return _interval(figure, name, 100.0, 1, " %")


def number(figure: dict[str, Any], name: str = "value") -> str:
    """`0.083 [0.071, 0.097]`."""
    return _interval(figure, name, 1.0, 3, "")


def _interval(figure: dict[str, Any], name: str, scale: float, digits: int, unit: str) -> str:
    if figure[name] is None:
        return "n/a"
    shown = f"{scale * figure[name]:.{digits}f}{unit}"
    if figure["ci95"] is None:
        return shown
    low, high = (f"{scale * bound:.{digits}f}" for bound in figure["ci95"])
    return f"{shown} [{low}, {high}]"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; bars and line ends in cells are made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def summary(metrics: dict[str, Any]) -> str:
    """The headline and the runs beside it, as the command line prints them."""
    rows = [[_named(name), *(percent(run[part]) for part in _PARTS)] for name, run in runs(metrics)]
    head = ["exact match, 95 % interval", *(f"{part} (n = {metrics[part]['n']})" for part in _PARTS)]
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [head, *rows]]
    if "against" in metrics:
        gain, counts, p, _ = _comparison(metrics["against"])
        lines.append(f"against the other predictions: {gain}, only this / only those right {counts}, McNemar p {p}")
    return "\n".join([*lines, *_skipped(metrics)])


def _named(name: str) -> str:
    return {"blank": "blank image", "shuffled": "another's image", "question_only": "question only"}.get(name, name)


def _skipped(metrics: dict[str, Any]) -> list[str]:
    """One line for every part that was asked for and has no figures."""
    baselines = metrics["baselines"]
    parts = {"baselines": baselines} if "skipped" in baselines else {_named(n): run for n, run in baselines.items()}
    parts |= {"calibration": metrics["calibration"], "seen answers": metrics["train"]}
    return [f"{name}: skipped ({part['skipped']})" for name, part in parts.items() if "skipped" in part]


def markdown(metrics: dict[str, Any], images: Iterable[str]) -> str:
    """The report's text; the same metrics (seconds and environment aside) give the same text."""
    shown = set(images)
    sections = [
        _head(metrics),
        "## Accuracy\n\n" + _accuracy_table(metrics) + _image("accuracy.png", shown),
        "## Protocols\n\n" + _protocol_table(metrics["protocols"]),
        "## Does it look at the image?\n\n" + _gain_table(metrics),
        "## Breakdown\n\n" + _breakdown_table(metrics) + _image("breakdown.png", shown),
        "## Calibration\n\n"
        + _calibration_table(metrics["calibration"])
        + _image("reliability.png", shown)
        + _image("risk_coverage.png", shown),
    ]
    if "against" in metrics:
        sections.insert(4, "## Against other predictions\n\n" + _against(metrics["against"]))
    return "\n\n".join(sections) + "\n"


def _image(name: str, shown: set[str]) -> str:
    return f"\n\n![{name.removesuffix('.png').replace('_', ' ')}]({name})" if name in shown else ""


def _head(metrics: dict[str, Any]) -> str:
    bootstrap = metrics["bootstrap"]
    facts = [
        ["checkpoint", metrics.get("checkpoint") or "none: answers from a file"],
        ["questions", metrics["n"]],
        ["images", metrics["num_images"]],
        ["language", metrics["language"] or "all"],
    ]
    if "n" in metrics["train"]:
        facts.append(["questions on images that training has", metrics["train"]["rows_on_training_images"]])
    return (
        f"# {metrics['dataset']}, {metrics['split']}\n\nResearch only, not for diagnosis.\n\n"
        + table(["", ""], facts)
        + f"\n\nIn brackets: 95 % interval by {bootstrap['num_resamples']:,} bootstrap resamples of images "
        f"(seed {bootstrap['seed']}). No width means that all rows agree, not that the figure is certain."
    )


def _accuracy_table(metrics: dict[str, Any]) -> str:
    rows = [[_named(name), *(percent(run[part]) for part in _PARTS)] for name, run in runs(metrics)]
    text = table(["exact match", *(f"{part} (n = {metrics[part]['n']})" for part in _PARTS)], rows)
    return "\n".join([text, *("\n" + line for line in _skipped(metrics))])


def _protocol_table(protocols: dict[str, Any]) -> str:
    exact, original, llava = protocols["exact_match"], protocols["original"], protocols["llava_med"]
    rows: list[Sequence[object]] = [
        ["exact_match", part, "accuracy", percent(exact[part]), exact[part]["n"]] for part in _PARTS
    ]
    rows.append(["exact_match", "overall", "strict", percent(exact["strict"]), exact["strict"]["n"]])
    rows += [["original", part, "accuracy", percent(original[part]), original[part]["n"]] for part in _PARTS]
    rows += [["llava_med", "open", m, percent(f, "value"), f["n"]] for m, f in llava["open"].items()]
    rows.append(["llava_med", "closed", "accuracy", percent(llava["closed"]), llava["closed"]["n"]])
    notes = "\n".join(f"- {name}: {protocol['definition']}." for name, protocol in protocols.items())
    return table(["protocol", "part", "measure", "value", "n"], rows) + "\n\n" + notes


def _comparison(run: dict[str, Any]) -> list[object]:
    gain = run["gain"]
    test = gain["mcnemar"]
    p = test["p_value"]
    changed = percent(run["answers_changed"], "value")
    counts = f"{test['only_this']} / {test['only_other']}"
    return [percent(gain["difference"], "value"), counts, "< 0.0001" if p < 1e-4 else f"{p:.4f}", changed]


_COMPARED = ["accuracy less the run's", "only this right / only the run", "McNemar exact p", "answers that differ"]


def _gain_table(metrics: dict[str, Any]) -> str:
    rows = [[_named(name), *_comparison(run)] for name, run in runs(metrics) if name != "answers"]
    skipped = "\n".join(_skipped(metrics))
    return table(["run", *_COMPARED], rows) if rows else f"No run to compare with.\n\n{skipped}"


def _against(run: dict[str, Any]) -> str:
    rows = [[*(percent(run[part]) for part in _PARTS), *_comparison(run)]]
    return table([*(f"theirs, {part}" for part in _PARTS), *_COMPARED], rows)


def _breakdown_table(metrics: dict[str, Any]) -> str:
    rows: list[Sequence[object]] = []
    for dimension, part in metrics["breakdown"].items():
        name = dimension.replace("_", " ")
        rows += [[name, cell, percent(f), f["n"], f["num_images"]] for cell, f in part["cells"].items()]
        hidden = part["hidden"]
        if hidden["num_cells"]:
            rows.append([name, f"cells under {MIN_CELL} rows: {hidden['num_cells']}", "hidden", hidden["n"], ""])
        if part["unlabelled"]:
            rows.append([name, "without a label", "", part["unlabelled"], ""])
    if not rows:
        return "No rows."
    note = "Resampling fewer than about 5 images gives an interval that is too narrow: read such cells by their counts."
    return table(["dimension", "cell", "exact match", "n", "images"], rows) + "\n\n" + note


def _calibration_table(calibration: dict[str, Any]) -> str:
    if "skipped" in calibration:
        return f"Skipped: {calibration['skipped']}."
    rows = [
        ["expected calibration error, 15 bins of equal width", number(calibration["ece_equal_width"])],
        ["expected calibration error, 15 bins of equal mass", number(calibration["ece_equal_mass"])],
        ["Brier score", number(calibration["brier"])],
        ["mean score", number(calibration["mean_score"])],
        ["area under risk-coverage (AURC)", number(calibration["aurc"])],
    ]
    rows += [[f"accuracy at {c} coverage", percent(f)] for c, f in calibration["accuracy_at_coverage"].items()]
    return table(["score = exp(logprob) against exact match", "value"], rows)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Strict JSON (NaN is an error) in UTF-8, with a line end."""
    # A lone surrogate has no UTF-8: written as its JSON escape.
    return (json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n").encode(
        errors="backslashreplace"
    )


def files(evaluation: Evaluation, folder: Path | None, json_file: Path | None) -> dict[Path, bytes]:
    """Every file of the result: in `folder` metrics.json, predictions.jsonl, report.md and plots; the metrics again
    under `json_file`."""
    metrics = json_bytes(evaluation.metrics, indent=2)
    found: dict[Path, bytes] = {}
    if folder is not None:
        images = plots(evaluation.metrics)
        found = {folder / name: data for name, data in images.items()}
        found[folder / "predictions.jsonl"] = b"".join(json_bytes(row) for row in evaluation.rows)
        found[folder / "report.md"] = markdown(evaluation.metrics, images).encode(errors="backslashreplace")
        found[folder / "metrics.json"] = metrics
    if json_file is not None:
        found[json_file] = metrics
    return found


def write_report(evaluation: Evaluation, folder: Path | None, json_file: Path | None = None) -> list[Path]:
    """Writes the result, all of it or none of it, and returns the paths.

    Raises:
        OSError: a file cannot be written (a full disk); what was there before is untouched.
    """
    found = files(evaluation, folder, json_file)
    write_files(found)
    if folder is not None:
        for path in (folder / name for name in PLOTS):
            if path not in found:
                # An earlier run's plot of something that this run has no figures for.
                path.unlink(missing_ok=True)
    return list(found)
