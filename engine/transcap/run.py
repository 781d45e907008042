"""A run: batches of label sets to a writer, its candidates to the cleaner, what is kept to the folder.

Knows the order of things; does not know any writer, nor how files are kept whole.

Captions are written once for each label set. A set that many images share gets a pool of up to `pool` captions, of
which every image draws `k` by the seed and its name.
"""

import csv
import hashlib
import io
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miss.engine.transcap.cleaning import Cleaner, is_same, tidy
from miss.engine.transcap.labels import Labels, LabelSet
from miss.engine.transcap.measure import measure
from miss.engine.transcap.sentences import captions as template_captions
from miss.engine.transcap.store import Record, RunFolder, json_lines
from miss.engine.transcap.writer import Candidate, Writer, Written, number

FORM = 1  # of the files; a folder of another form is not gone on with


@dataclass(frozen=True)
class TransCapConfig:
    """k: captions an image. pool: captions a label set, where many images share it. candidates: what a writer is asked
    for, a label set. batch: label sets between two writes to the disk. limit: label sets at most, drawn by the seed.
    fill: template captions up to k, where a writer's were rejected."""

    k: int = 5
    pool: int = 10
    candidates: int = 16
    batch: int = 4
    limit: int | None = None
    seed: int = 0
    fill: bool = True

    def __post_init__(self) -> None:
        for name in ("k", "pool", "candidates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: got {getattr(self, name)}; wanted at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: got {self.limit}; wanted at least 1")
        if self.pool < self.k:
            raise ValueError(f"--pool: got {self.pool}; wanted at least --k, {self.k}")


def choose_sets(labels: Labels, config: TransCapConfig) -> list[LabelSet]:
    """The label sets of a run, in the file's order: all, or `limit` of them drawn by the seed."""
    if config.limit is None or config.limit >= len(labels.sets):
        return labels.sets
    drawn = {s.key for s in sorted(labels.sets, key=lambda s: number(config.seed, "limit", s.key))[: config.limit]}
    return [s for s in labels.sets if s.key in drawn]


def run(
    labels: Labels,
    writer: Writer,
    folder: Path,
    config: TransCapConfig,
    resume: str = "auto",
    tell: Callable[[int, Record | None], None] = lambda done, batch: None,
) -> Record:
    """Writes captions for all label sets and returns the report that stands in the folder.

    Args:
        tell: called with the number of sets done, first with those that were there already, and the batch.

    Raises:
        StoreError: the folder holds another run.
        WriterError: the writer cannot go on; what is written stays, and the same command goes on from there.
    """
    sets = choose_sets(labels, config)
    with RunFolder(folder, _settings(sets, writer, config), resume) as store:
        batches = [sets[i : i + config.batch] for i in range(0, len(sets), config.batch)]
        done = sum(len(b["sets"]) for b in store.batches)
        tell(done, None)
        if len(store.batches) < len(batches):
            writer.prepare()
        for batch in batches[len(store.batches) :]:
            start = time.perf_counter()
            written = writer.write(batch, config.candidates, config.seed)
            records = [choose(s, w, writer, config) for s, w in zip(batch, written, strict=True)]
            seconds = time.perf_counter() - start
            store.append({"batch": len(store.batches), "seconds": round(seconds, 3), "sets": records})
            done += len(batch)
            tell(done, store.batches[-1])
        return _finish(store, sets, labels, writer, config)


def choose(label_set: LabelSet, written: Written, writer: Writer, config: TransCapConfig) -> Record:
    """What is kept for a label set, the likeliest first, and why the others are not."""
    cleaner, kept, rejected, spare = Cleaner(label_set.facts), list[Record](), list[Record](), 0
    wanted = config.k if len(label_set.images) == 1 else min(config.pool, config.k * len(label_set.images))
    for candidate in sorted(written.candidates, key=lambda c: -(c.score or 0.0)):
        text, why = judge(candidate, cleaner, [str(c["text"]) for c in kept])
        if why:
            rejected.append({"text": text or candidate.text, "score": candidate.score, "why": why})
        elif len(kept) < wanted:
            kept.append({"text": text, "score": candidate.score, "writer": writer.name})
        else:
            spare += 1
    if config.fill and writer.name != "template":
        kept += _filling(label_set, cleaner, kept, config)
    return {
        "set": label_set.key,
        "facts": label_set.facts,
        "num_images": len(label_set.images),
        "candidates": len(written.candidates),
        "captions": kept,
        "rejected": rejected,
        "spare": spare,
        "tokens": written.tokens,
        "model": written.model or writer.identity["model"],
    }


def judge(candidate: Candidate, cleaner: Cleaner, kept: list[str]) -> tuple[str, list[str]]:
    """(the caption in its final form, why it is rejected)."""
    text = tidy(candidate.text)
    why = [] if candidate.finished else ["unfinished"]
    why += [str(problem) for problem in cleaner.problems(text)]
    if not why and any(is_same(text, other) for other in kept):
        why = ["same: as one that is kept"]
    return text, why


def _filling(label_set: LabelSet, cleaner: Cleaner, kept: list[Record], config: TransCapConfig) -> list[Record]:
    texts, found = [str(c["text"]) for c in kept], list[Record]()
    for text in template_captions(label_set.facts, 6 * config.k, number(config.seed, label_set.key)):
        if len(texts) >= config.k:
            break
        if not judge(Candidate(text), cleaner, texts)[1]:
            texts.append(text)
            found.append({"text": text, "score": None, "writer": "template", "filled": True})
    return found


def _settings(sets: list[LabelSet], writer: Writer, config: TransCapConfig) -> Record:
    digest = hashlib.sha256(json.dumps([(s.facts, s.images) for s in sets], ensure_ascii=False).encode()).hexdigest()
    prompt = {"prompt": writer.prompt.name, "prompt_hash": writer.prompt.hash} if writer.prompt else {}
    return {"form": FORM, "labels": digest[:16], "writer": writer.name, **writer.identity, **prompt, **asdict(config)}


def _finish(store: RunFolder, sets: list[LabelSet], labels: Labels, writer: Writer, config: TransCapConfig) -> Record:
    records = [record for batch in store.batches for record in batch["sets"]]
    rows = _rows(sets, records, writer, config)
    report = {
        "settings": _settings(sets, writer, config),
        "label_sets": len(sets),
        "label_sets_in_file": len(labels.sets),
        "left_out": labels.left_out,
        "images": len(rows),
        "images_without_caption": sorted({i for s in sets for i in s.images} - {row["image"] for row in rows}),
        **measure(records, sum(batch["seconds"] for batch in store.batches), writer.name),
    }
    files = {
        "sets.jsonl": json_lines(records),
        "captions.jsonl": json_lines(rows),
        "captions.csv": _csv(rows, config.k),
    }
    store.finish({**files, "report.json": json.dumps(report, indent=2, ensure_ascii=False).encode()})
    return report


def _rows(sets: list[LabelSet], records: list[Record], writer: Writer, config: TransCapConfig) -> list[Record]:
    """One row an image, with its captions and where they come from; none for an image that has no caption."""
    prompt = {"prompt": writer.prompt.name, "prompt_hash": writer.prompt.hash} if writer.prompt else {}
    rows = []
    for label_set, record in zip(sets, records, strict=True):
        pool: list[Record] = record["captions"]
        source = {**writer.identity, **prompt, "answered_as": record["model"], "seed": config.seed}
        for image in label_set.images if pool else []:
            draw = random.Random(number(config.seed, "draw", image))
            drawn = draw.sample(pool, min(config.k, len(pool)))
            rows.append(
                {
                    "image": image,
                    "captions": [c["text"] for c in drawn],
                    "labels": dict(_merge(label_set.facts)),
                    "set": label_set.key,
                    "sources": [{key: c[key] for key in ("writer", "score", "filled") if key in c} for c in drawn],
                    "provenance": source,
                }
            )
    return rows


def _merge(facts: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, value in facts:
        merged[key] = (
            value if key not in merged else [*([merged[key]] if isinstance(merged[key], str) else merged[key]), value]
        )
    return merged


def _csv(rows: list[Record], k: int) -> bytes:
    """The original's form: `list`, `describe1` … Where an image has fewer captions they come again, never a gap."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["list", *(f"describe{i + 1}" for i in range(k))])
    for row in rows:
        texts = row["captions"]
        table.writerow([row["image"], *(texts[i % len(texts)] for i in range(k))])
    return text.getvalue().encode()
