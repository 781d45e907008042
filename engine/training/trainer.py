"""The training loop: step after step from any step on, with validation, checkpoints and a log.

Knows the order of things in a step and a run; does not know what is trained (the task), which engine makes the update,
what validation means, or where the batches come from: all are handed in. On CUDA: written for it, never run here.
"""

import json
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miss.engine.data.augment import hash64
from miss.engine.training.checkpoint import CheckpointStore, saving, verify
from miss.engine.training.config import RunConfig
from miss.engine.training.ema import Ema
from miss.engine.training.flops import matmul_ceiling
from miss.engine.training.log import NoLog, RunLog, draw_curves
from miss.engine.training.plain import Engine
from miss.engine.training.ranks import ALONE, Ranks
from miss.engine.training.schedule import rate_share
from miss.engine.training.spent import Spent
from miss.engine.training.state import (
    Generators,
    check_same_run,
    load_model_tensors,
    load_random,
    random_state,
    save_random,
    save_tensors,
    seed_everything,
    write_json,
)
from miss.engine.training.task import Answering, Loader, Outcome, Task, Work

_NEW_RANK = 22  # what a hash is for

Validate = Callable[[nn.Module], dict[str, float]]
Export = Callable[[Path], None]


class NotFinite(ValueError):
    """The loss or a gradient is not a number, or infinite; nothing was updated with it."""


class Stopped(SystemExit):
    """A signal ended the run after its state was saved; `code` is 128 + the signal's number."""


@dataclass
class Progress:
    """Where a run is. `step` steps are done; `best` is None before the first validation."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse_in_a_row: int = 0
    validated: int = 0  # the last step after which validation ran


@dataclass
class Interval:
    """Sums since the last line of the log."""

    steps: int = 0
    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)  # the task's
    rows: int = 0
    images: int = 0
    flops: float = 0.0
    norm: float = 0.0
    before: dict[str, float] = field(default_factory=dict)  # seconds by kind when it began


class Trainer:
    """One run in one output folder.

    Args:
        model: frozen parameters already say so.
        loader: the steps, by number.
        engine: makes the updates.
        config: the run; `config.schedule.total_steps` steps in all.
        output: `checkpoints/`, `best/`, `last/`, `log.jsonl`, `loss.png` and `summary.json` go here.
        validate: called with the averaged weights in the model; `config.validation.metric` of what it returns counts.
        export: writes the model, as it is when called, as a checkpoint folder for answering; all of it or nothing.
        task: what is trained; without one, answering.
        copy: stands in for the model in validation and export, where the engine does not keep that one whole.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        engine: Engine,
        config: RunConfig,
        output: Path,
        *,
        device: torch.device,
        task: Task | None = None,
        validate: Validate | None = None,
        export: Export | None = None,
        ranks: Ranks = ALONE,
        copy: nn.Module | None = None,
    ) -> None:
        self.model, self.loader, self.engine, self.config, self.output = model, loader, engine, config, output
        self.device, self.validate, self.export = device, validate, export
        self.task: Task = Answering(model, config, device, ranks) if task is None else task
        self.ranks, self.shown = ranks, model if copy is None else copy
        self.ema = Ema(self.shown, config.ema.decay) if config.ema.decay else None
        self.progress = Progress()
        self.store = CheckpointStore(output / "checkpoints", config.checkpoint.keep_last)
        self.spent = Spent(ranks.clock)
        self._signal: int | None = None
        self._some_signal = False  # whether any rank has got one: known to all after each step
        self._may_interrupt = False
        self._ceiling: float | None = None
        self._saved = 0  # the step of the last checkpoint, written or read

    def fit(self, stop_at: int | None = None) -> dict[str, Any]:
        """Trains to the schedule's end, to an early stop, or to `stop_at` steps; saves; returns the summary.

        Raises:
            NotFinite: before the update that would have spoilt the weights.
            Stopped: on SIGTERM or SIGINT, after saving.
            CheckpointNotSaved: the disk is full.
        """
        total = self.config.schedule.total_steps
        last = min(total, stop_at if stop_at is not None else total)
        started, first = time.perf_counter(), self.progress.step
        self.spent = Spent(self.ranks.clock)
        log = RunLog(self.output, total, first, self.config.log.tensorboard) if self.ranks.first else NoLog()
        self.model.train()
        try:
            with self._signals():
                self._measure_ceiling(log)
                self._run(last, total, log)
                self._finish()
            if self.ranks.first:
                draw_curves(self.output, self.config.validation.metric, self.task.loss_is)
            return self._summary(first, time.perf_counter() - started)
        finally:
            log.close()

    def _run(self, last: int, total: int, log: RunLog) -> None:
        if self.progress.step and self._between_steps(self.progress.step, total, log):
            return  # what a signal kept the run from doing after its last step
        with closing(self.loader.steps(self.progress.step)) as steps:
            interval = Interval(before=self.spent.seconds())
            while self.progress.step < last:
                with self.spent.on("data"):
                    work = next(steps)
                self._step(work, interval)
                done = self.progress.step = self.progress.step + 1
                if done % self.config.log.every == 0 or done == last:
                    self._log(log, interval)
                    interval = Interval(before=self.spent.seconds())
                if self._between_steps(done, total, log):
                    return

    def _between_steps(self, done: int, total: int, log: RunLog) -> bool:
        """Validation, checkpoint and signals that are due after a step; True where the run should stop early."""
        self._leave_if_signalled()
        validation, progress = self.config.validation, self.progress
        due = done == total or (validation.every and done % validation.every == 0)
        if self.validate is not None and due and progress.validated != done:
            with self.spent.on("validation"):
                self._validate(log)
        if 0 < validation.patience <= progress.worse_in_a_row:
            log.say(f"no better {validation.metric} in {progress.worse_in_a_row} validations: done")
            return True
        every = self.config.checkpoint.every
        if every and done % every == 0 and done != total and progress.step != self._saved:
            self.save()
        self._leave_if_signalled()
        return False

    def _step(self, work: Work, interval: Interval) -> None:
        config, index, last = self.config, work.index, len(work.parts) - 1
        total = torch.zeros((), device=self.device)
        outcomes: list[Outcome] = []
        for number in range(len(work.parts)):
            with self._autocast():
                outcome = self.task.run(self.engine, work, number)
            self.engine.backward(outcome.loss, number == last)
            total = total + outcome.loss.detach()
            outcome.loss = outcome.loss.detach()  # what was computed for it is not kept
            outcomes.append(outcome)
        signalled = torch.tensor([self._signal is not None], dtype=torch.float64, device=self.device)
        own = torch.stack([outcome.sums for outcome in outcomes]).sum(0)
        sums = self.ranks.reduce_sum(torch.cat([total.double()[None], signalled, own]))
        # The step's one wait for the device: loss and norm must be known, to all ranks, before the update.
        value, num_signalled, *counts, norm = torch.cat([sums, self.engine.gradient_norm().double()[None]]).tolist()
        value /= self.ranks.world_size
        self._some_signal = num_signalled > 0
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise self._not_finite(work, outcomes, value, norm)
        self.engine.step(rate_share(index, config.schedule), config.optimizer.clip, norm)
        self.task.updated(self.engine, outcomes)
        if self.ema is not None:
            self.ema.update(self.engine.values())
        interval.steps, interval.loss, interval.norm = interval.steps + 1, interval.loss + value, interval.norm + norm
        for name, count in zip(self.task.names, counts, strict=True):
            interval.sums[name] = interval.sums.get(name, 0.0) + count
        interval.rows, interval.images = interval.rows + work.num_rows, interval.images + work.num_images
        interval.flops += self.task.flops(work)

    def _not_finite(self, work: Work, outcomes: list[Outcome], value: float, norm: float) -> NotFinite:
        named = self.task.named(work, outcomes)
        what = f"loss {value}" if not math.isfinite(value) else f"gradient norm {norm}"
        return NotFinite(
            f"step {work.index + 1}: {what}; stopped before the update. Rows: {', '.join(named)}. "
            f"Check these rows or lower the rates, and start anew with --init on the best weights so far"
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what is shown holds the moving average (where there is one) and is in evaluation mode."""
        if self.shown is not self.model and self.ema is None:
            own = dict(self.shown.named_parameters())
            with torch.no_grad():
                for values in self.engine.values():
                    for name, value in values.items():
                        own[name].copy_(value.reshape(own[name].shape))  # an engine may keep a scalar as a vector
        self.shown.eval()
        try:
            with self.ema.applied() if self.ema is not None else nullcontext():
                yield
        finally:
            self.model.train()

    def _validate(self, log: RunLog) -> None:
        assert self.validate is not None
        started, progress, name = time.perf_counter(), self.progress, self.config.validation.metric
        with self.averaged(), torch.no_grad():
            self._may_interrupt = self.ranks.world_size == 1  # nothing of the run's state changes meanwhile
            self._leave_if_signalled()
            metrics = self.ranks.broadcast_object(self.validate(self.shown))
            self._may_interrupt = False
            if name not in metrics:
                raise ValueError(f"validation.metric: got {name!r}; validation gives {', '.join(metrics)}")
            value = metrics[name]
            least = name.startswith("loss")  # of losses less is better
            better = progress.best is None or (value < progress.best if least else value > progress.best)
            if better:
                progress.best, progress.best_step, progress.worse_in_a_row = value, progress.step, 0
                self._export("best")
            else:
                progress.worse_in_a_row += 1
            progress.validated = progress.step
        log.write("validation", progress.step, {**metrics, "seconds": round(time.perf_counter() - started, 2)})
        shown = "  ".join(f"{key} {v:.4f}" for key, v in metrics.items())
        log.say(f"step {progress.step}  validation: {shown}{'  (best so far)' if better else ''}")

    def _export(self, name: str) -> None:
        if self.export is not None and self.ranks.first:
            with self.spent.on("checkpoint"), saving(self.output / name):
                self.export(self.output / name)

    def _finish(self) -> None:
        with self.averaged():
            self._export("last")
        self.save()

    def _log(self, log: RunLog, interval: Interval) -> None:
        spent = self.spent.since(interval.before)
        seconds = max(sum(spent[kind] for kind in ("compute", "communication", "data")), 1e-9)
        step, rate = self.progress.step, self.config.optimizer.rate_new
        values: dict[str, Any] = {
            "loss": interval.loss / interval.steps,
            **self.task.figures(interval.sums, interval.loss / interval.steps, interval.steps, interval.rows),
            "gradient_norm": interval.norm / interval.steps,
            "rate_new": rate * rate_share(step - 1, self.config.schedule),
            "epoch": round(self.loader.epoch_of_step(step), 4),
            f"{self.task.unit}_per_s": interval.rows / seconds,
            "images_per_s": interval.images / seconds,
            "s_per_step": seconds / interval.steps,
            "data_wait_share": spent["data"] / seconds,
            **{f"{kind}_s": value / interval.steps for kind, value in spent.items()},
            "gflops_per_s": interval.flops / seconds / 1e9,
            "eta_s": (self.config.schedule.total_steps - step) * seconds / interval.steps,
        }
        if self._ceiling:
            values["ceiling_share"] = interval.flops / seconds / self._ceiling
        if self.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        values["resident_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # the most so far
        log.write("train", step, values)
        log.progress(step, values, self.task.unit)

    def _measure_ceiling(self, log: RunLog) -> None:
        if self.config.log.ceiling and self.ranks.first:
            self._ceiling = matmul_ceiling(self.device, torch.bfloat16 if self.config.bf16 else torch.float32)
            log.write("ceiling", self.progress.step, {"gflops_per_s": self._ceiling / 1e9})

    def _summary(self, first: int, seconds: float) -> dict[str, Any]:
        summary = {**asdict(self.progress), "total_steps": self.config.schedule.total_steps}
        summary |= {"metric": self.config.validation.metric, "resumed_from": first, "seconds": round(seconds, 1)}
        summary["spent"] = {kind: round(value, 2) for kind, value in self.spent.seconds().items()}
        if self.ranks.first:
            write_json(self.output / "summary.json", summary)
        return summary

    # ---- state ----

    def save(self) -> Path:
        """The whole state as a checkpoint of the present step: gathered from all ranks, written by the first."""
        with self.spent.on("checkpoint"):
            return self._save()

    def _save(self) -> Path:
        weights, state, generators = self.engine.weights(), self.engine.state(), random_state()
        everyone = self.ranks.gather_objects(generators)

        def write(folder: Path) -> None:
            self._write(folder, weights, state, everyone)

        step, best = self.progress.step, self.progress.best_step
        path = self.ranks.on_first(lambda: self.store.save(step, write, best))
        self._saved = step
        return path

    def _write(
        self, folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], generators: list[Generators]
    ) -> None:
        save_tensors(weights | dict(self.model.named_buffers()), folder / "model.safetensors")
        if self.ema is not None:
            save_tensors(self.ema.average, folder / "average.safetensors")
        save_tensors(optimizer, folder / "optimizer.safetensors")
        if memory := self.task.tensors():
            save_tensors(memory, folder / "memory.safetensors")
        save_random(folder, generators)
        state = {
            "progress": asdict(self.progress),
            "average_updates": self.ema.num_updates if self.ema is not None else 0,
            "config": self.config.to_dict(),
        }
        write_json(folder / "state.json", state)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint folder, exactly: what follows is what would have followed there.

        Raises:
            CheckpointCorrupt: the folder is damaged.
            ValueError: it is of another model, or of a run that was configured otherwise.
        """
        self.ranks.on_first(lambda: verify(path))
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        check_same_run(type(self.config).from_dict(state["config"]), self.config)
        tensors = load_file(path / "model.safetensors")
        load_model_tensors(self.shown, tensors)
        self.engine.load_weights(tensors)
        if self.ema is not None:
            self.ema.load(load_file(path / "average.safetensors"), state["average_updates"])
        self.engine.load_state(load_file(path / "optimizer.safetensors"))
        if self.task.tensors():
            self.task.load(load_file(path / "memory.safetensors"))
        self.progress = Progress(**state["progress"])
        if not load_random(path, self.ranks.rank):
            seed_everything(hash64(self.config.seed, _NEW_RANK, self.progress.step, self.ranks.rank))
        self._saved = self.progress.step

    # ---- signals ----

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask the run to save at the next step's end and leave; a second SIGINT leaves at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number
            if self._may_interrupt:
                self._may_interrupt = False
                raise _Interrupted

        names = (signal.SIGTERM, signal.SIGINT)
        try:
            before = {name: signal.signal(name, ask) for name in names}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        except _Interrupted:
            self._leave_if_signalled()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _leave_if_signalled(self) -> None:
        if self._signal is None if self.ranks.world_size == 1 else not self._some_signal:
            return
        with self.averaged():
            self._export("last")
        path, number = self.save(), self._signal or signal.SIGTERM
        if self.ranks.first:
            print(f"{signal.Signals(number).name}: saved {path}; go on with --resume auto", flush=True)
        raise Stopped(128 + number)


class _Interrupted(Exception):
    """A signal during validation."""
