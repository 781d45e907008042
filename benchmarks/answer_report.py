"""Whole answers for people and for files: tables, one JSON object, and what earlier runs left in a folder.

Knows the results' keys; does not know how they were measured, or plots.
"""

import json
from pathlib import Path
from typing import Any

from miss.benchmarks import answer_shares
from miss.benchmarks.answer_models import QUESTION_TOKENS
from miss.models.config import MissConfig

_BUSY = 0.05
_HEAD = (
    "",
    "ms",
    "min",
    "image",
    "question",
    "decode",
    "± %",
    "ours / it",
    "logit error max, mean",
    "same answers",
    "accuracy",
    "MB",
    "peak MB",
)


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a peer. `ours / it` is how many times faster ours of the same precision is."""
    setting, environment = result["setting"], result["environment"]
    title = (
        f"### {setting['preset']}, {setting['image_size']} px, {setting['batch']} images, "
        f"{setting['questions_per_image']} questions an image, {setting['tokens']} tokens\n\n"
        f"{environment['processor']}, {environment['threads']} threads, torch {environment['torch']}, "
        f"commit {environment['commit']}, {environment['date']}\n"
    )
    lines = [title, "| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    lines += ["| " + " | ".join(_cells(name, row, result)) + " |" for name, row in result["rows"].items()]
    lines += [f"\n{name} against {r['ours']}: {_ratio(r)}" for name, r in result["ratios"].items() if "/" in name]
    lines += [f"\n{name}: {reason}" for name, reason in result["failed"].items()]
    busy = max((row["other_load"] for row in result["rows"].values()), default=0.0)
    if busy > _BUSY:
        lines.append(f"\nOther processes had up to {busy:.0%} of the cores meanwhile.")
    return "\n".join(lines) + "\n" + _own(result)


def _cells(name: str, row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    stages, errors, judged = row["stages"], row["errors"], result["answers"].get(name, {})
    error = "failed" if "failed" in errors else f"{errors['relative_max']:.1e}, {errors['relative_mean']:.1e}"
    return [
        f"**{name}**" if row["ours"] else name,
        f"{row['ms']['median']:.1f}",
        f"{row['ms']['min']:.1f}",
        *(f"{stages[stage]['median']:.1f}" for stage in ("image", "question", "decode")),
        f"{50 * row['ms']['spread']:.0f}",
        _ratio(result["ratios"].get(name)),
        error,
        f"{judged['agreement']:.2%}" if "agreement" in judged else "",
        f"{judged['accuracy']:.2%}" if "accuracy" in judged else "",
        f"{row['memory'].get('resident_mb', 0):.0f}",
        f"{row['memory'].get('peak_mb', 0):.0f}",
    ]


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}x ({found['min']:.2f}-{found['max']:.2f})"


def _own(result: dict[str, Any]) -> str:
    lines = []
    for name, row in result["rows"].items():
        if "decode_share_of_read" in row:
            lines.append(
                f"- {name}: a decode step {row['decode_step_ms']:.2f} ms, {row['decode_share_of_read']:.0%} of the "
                f"{row['read_gbps']:.0f} GB/s that memory gives"
            )
        if "cached_ms" in row:
            lines[-1] += (
                f"; an image seen before: {row['cached_ms']['total']:.1f} ms, {row['cached_over_stages']:.2f}x its "
                f"question and decode"
            )
        if "grouped" in row:
            found = row["grouped"]
            lines[-1] += (
                f"; questions together {found['speed_up']:.2f}x as fast as apart, {found['share']:.0%} of what the "
                f"operations allow"
            )
    return "\n".join(["", *lines, ""])


def with_groups(results: list[dict[str, Any]]) -> None:
    """Adds to results of several questions an image how they compare with one question, where that was measured."""
    single = {
        _key(r): r["rows"] for r in results if r["setting"]["questions_per_image"] == 1 and r["setting"]["batch"] == 1
    }
    for result in results:
        setting = result["setting"]
        if setting["questions_per_image"] == 1 or setting["batch"] != 1 or _key(result) not in single:
            continue
        config = config_of(setting)
        for name, row in result["rows"].items():
            if name in single[_key(result)]:
                one = single[_key(result)][name]["ms"]["median"]
                count = setting["questions_per_image"]
                row["grouped"] = answer_shares.grouped(
                    config, one, row["ms"]["median"], count, QUESTION_TOKENS, setting["tokens"]
                )


def config_of(setting: dict[str, Any]) -> MissConfig:
    """The sizes of a setting's model."""
    import dataclasses

    config = MissConfig.preset(setting["preset"])
    preprocess = dataclasses.replace(config.preprocess, image_size=setting["image_size"])
    return dataclasses.replace(config, preprocess=preprocess)


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    setting = result["setting"]
    return setting["preset"], setting["image_size"], setting["tokens"]


def write(folder: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files answer-<setting>.json and answer.md of everything in the folder, earlier runs' settings included.

    Returns:
        All results that the folder now has, those of one environment or another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        path = folder / f"answer-{result['setting']['label']}.json"
        temporary = path.with_name(f".{path.name}.new")  # whole or not at all: the process may be ended at any time
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
        temporary.replace(path)
    everything = read(folder)
    with_groups(everything)
    text = "# Whole answers\n\nWritten by `miss bench answer`; times in milliseconds for all questions of a batch.\n\n"
    (folder / "answer.md").write_text(text + "\n".join(map(table, everything)), encoding="utf-8")
    return everything


def read(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, smallest setting first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("answer-*.json"))]
    order = ("preset", "image_size", "batch", "questions_per_image", "tokens")
    return sorted(found, key=lambda result: tuple(result["setting"][name] for name in order))


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The first setting's figures on top, as the one object that a run ends with, and all settings below."""
    first = results[0]
    return {
        "benchmark": "answer",
        "environment": first["environment"],
        "setting": first["setting"],
        "ratios": first["ratios"],
        "stages": {name: row["stages"] | {"total": row["ms"]} for name, row in first["rows"].items()},
        "memory": {name: row["memory"] for name, row in first["rows"].items()},
        "errors": {name: row["errors"] for name, row in first["rows"].items()},
        "answers": first["answers"],
        "failed": first["failed"],
        "settings": results,
    }
