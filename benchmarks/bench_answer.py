"""Whole answers: our engine against the peers on the same weights, images, tokens and threads. `miss bench answer`.

Knows what is measured and in which order; does not know how a peer runs, or how results are shown.

1. Every setting (image size, batch, questions an image, tokens) has a checkpoint and a job; each peer converts it once.
2. Peers are started together, each in a process of its own that has loaded what it needs and waits on its pipe, and
   answer in turn. Where they are too many for the memory, they come in groups, ours in every group; what compiles for
   minutes comes last and alone. After each group all that is known is handed on.
3. First-token logits are compared with float64, on the same checkpoint; answers, on the checkpoint that ships.
"""

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from miss.benchmarks import answer_errors, answer_models, answer_rounds, answer_shares, record
from miss.benchmarks.answer_models import Model
from miss.benchmarks.answer_rounds import Turns, ratio, spread
from miss.benchmarks.answer_settings import Options, Setting
from miss.benchmarks.ceilings import Ceilings
from miss.benchmarks.peers.catalogue import OURS, Entry, chosen
from miss.benchmarks.peers.process import PeerError, PeerProcess, convert
from miss.models.weights import read_config

_REFERENCE = "hf-fp32"  # what every precision of ours is held against, besides the peers of its own


def run(options: Options, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measures each setting; what is known of it after each group of peers, so that a run that is ended has said it:
    the last result of a setting is the whole. The errors of the shipped checkpoint are in every one."""
    peers, absent = chosen(options.peers, options.device)
    wanted = [entry for entry in OURS if entry.precision in options.precisions]
    absent |= {entry.name: reason for entry in wanted if (reason := entry.misses_device(options.device))}
    ours = [entry for entry in wanted if entry.name not in absent]
    for name, reason in absent.items():
        say(f"{name}: {reason}")
    judged = _judged(options, [*ours, *peers], say) if options.judged else {}
    ceilings = Ceilings(torch.device(options.device))
    for setting in options.settings:
        for result in _setting(setting, options, ours, peers, absent, ceilings, say):
            yield result | {"answers": judged}


def _setting(
    setting: Setting,
    options: Options,
    ours: list[Entry],
    peers: list[Entry],
    absent: dict[str, str],
    ceilings: Ceilings,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    model = answer_models.timed_model(setting.preset, setting.image_size, options.work)
    failed = dict(absent)
    peers = [peer for peer in peers if _converted(peer, model, options, failed, say)]
    job = answer_models.timed_job(model, options.data, setting.batch, setting.questions_per_image, setting.tokens)
    file = model.work / "jobs" / f"{setting.label}.npz"
    job.save(file)
    rows: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    environment = {**record.environment(torch.device(options.device)), "before": record.moment()}
    for group in groups(peers, options.together):
        say(f"{setting.label}: {', '.join(entry.name for entry in [*ours, *group])}")
        found = _group(setting, options, model, file, [*ours, *group], failed, ceilings)
        ratios |= _ratios({name: turns for name, (turns, _) in found.items()}, ours, group)
        rows |= {name: row for name, (_, row) in found.items() if name not in rows}
        yield {
            "benchmark": "answer",
            "setting": asdict(setting) | {"label": setting.label},
            "environment": environment | {"after": record.moment()},
            "rows": dict(rows),
            "ratios": dict(ratios),
            "failed": dict(failed),
        }


def groups(peers: list[Entry], together: int) -> list[list[Entry]]:
    """The peers that are loaded at once, `together` of them, then one by one those that are to be alone; one group at
    least, in which ours may be alone."""
    many, single = [p for p in peers if not p.alone], [[p] for p in peers if p.alone]
    found = [many[start : start + together] for start in range(0, len(many), together)] + single
    return found or [[]]


def _group(
    setting: Setting,
    options: Options,
    model: Model,
    file: Path,
    entries: list[Entry],
    failed: dict[str, str],
    ceilings: Ceilings,
) -> dict[str, tuple[Turns, dict[str, Any]]]:
    threads = options.threads or torch.get_num_threads()
    reads: list[float] = []
    names = [entry.name for entry in entries]
    start = functools.partial(PeerProcess, checkpoint=model.checkpoint, work=model.work, threads=threads)
    make = [functools.partial(start, entry, device=options.device) for entry in entries]
    ours = frozenset(entry.name for entry in entries if entry.ours)
    with answer_rounds.started(make, failed, names) as alive:
        found, dropped = answer_rounds.in_turn(
            alive, file, options.rounds_of(setting), lambda: reads.append(ceilings.bandwidth("read")), ours
        )
        failed |= dropped
        memory = {peer.entry.name: peer.memory() | {"load_s": round(peer.load_seconds, 2)} for peer in alive}
        few = answer_models.timed_job(model, options.data, 2, 1, 1)
        errors = answer_errors.logit_errors(alive, model.checkpoint, few, model.work / "jobs" / "first.npz")
    config, _ = read_config(model.checkpoint)
    rows = {}
    for entry in (entry for entry in entries if entry.name in found):
        turns = found[entry.name]
        row = {"precision": entry.precision, "ours": entry.ours, **_row(turns), "memory": memory[entry.name]}
        row["errors"] = errors[entry.name]
        if entry.ours:
            row |= answer_shares.shares(config, setting.tokens, entry.precision, turns, statistics.median(reads))
        rows[entry.name] = (turns, row)
    return rows


def _row(turns: Turns) -> dict[str, Any]:
    return {
        "ms": spread(turns.seconds["total"]),
        "stages": {stage: spread(turns.seconds[stage]) for stage in answer_rounds.STAGES[:-1]},
        "rounds": len(turns.seconds["total"]),
        "tokens": turns.tokens[:2],
        "other_load": round(statistics.median(turns.other_load), 3),
        "idle_cpu": round(turns.idle_cpu / turns.waited, 4) if turns.waited else 0.0,
    }


def _ratios(found: dict[str, Turns], ours: list[Entry], peers: list[Entry]) -> dict[str, Any]:
    """Each peer against ours of its precision; Hugging Face's fp32 against every one of ours too."""
    result = {}
    for peer in (peer for peer in peers if peer.name in found):
        for mine in (mine for mine in ours if mine.name in found):
            if mine.name == peer.against:
                result[peer.name] = ratio(found[peer.name], found[mine.name]) | {"ours": mine.name}
            elif peer.name == _REFERENCE:
                result[f"{peer.name}/{mine.name}"] = ratio(found[peer.name], found[mine.name]) | {"ours": mine.name}
    return result


def _converted(
    entry: Entry, model: Model, options: Options, failed: dict[str, str], say: Callable[[str], None]
) -> bool:
    """Whether what the peer loads is there, made now where it was not."""
    folder, small = model.work / "calibration", "small" in model.work.name
    paths = sorted(folder.glob("calibration-*.npz"))
    paths = paths or answer_models.calibration_jobs(model, options.data, 128 if small else 24, folder)
    try:
        convert(entry, model.checkpoint, model.work, paths, options.threads or torch.get_num_threads())
    except PeerError as error:
        failed[entry.name] = str(error)
        say(str(error))
    return entry.name not in failed


def _judged(options: Options, entries: list[Entry], say: Callable[[str], None]) -> dict[str, Any]:
    """Answers of the shipped checkpoint; {} where the data set is not there."""
    samples = answer_models.samples(options.data, "validate")
    if not samples:
        say("answers are not judged: no SLAKE in --data, $MISS_DATA or ../shared/data")
        return {}
    model = answer_models.judged_model(options.work)
    failed: dict[str, str] = {}
    jobs = answer_errors.jobs_for(model, samples, options.judged, 20)
    found: dict[str, list[list[int]]] = {}
    for entry in entries:
        say(f"answers of {entry.name}")
        try:
            if _converted(entry, model, options, failed, say):
                threads = options.threads or torch.get_num_threads()
                with PeerProcess(entry, model.checkpoint, model.work, threads, True, options.device) as peer:
                    found[entry.name] = answer_errors.answers(peer, jobs, model.work / "jobs", lambda count: None)
        except PeerError as error:
            failed[entry.name] = str(error)
    reference = _REFERENCE if _REFERENCE in found else "miss-fp32"
    result = answer_errors.judged(found, reference, model, jobs) if reference in found else {}
    return result | {name: {"failed": reason} for name, reason in failed.items()}
