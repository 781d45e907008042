"""The training loop: step after step from any step on, with validation, checkpoints and a log.

Knows the order of things in a step and a run; does not know which engine makes the update, what validation means, or
where the batches come from: all three are handed in. On CUDA: written for it, never run here.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from miss.engine.data.augment import hash64
from miss.engine.data.loader import GroupedLoader, Step
from miss.engine.training import not_finite
from miss.engine.training.checkpoint import CheckpointCorrupt, CheckpointNotSaved, CheckpointStore, saving, verify
from miss.engine.training.config import TrainConfig
from miss.engine.training.ema import Ema
from miss.engine.training.flops import matmul_ceiling, training_flops
from miss.engine.training.log import NoLog, RunLog, draw_curves
from miss.engine.training.not_finite import NotFinite, Suspects, watched_gradients
from miss.engine.training.plain import Engine
from miss.engine.training.ranks import ALONE, Ranks
from miss.engine.training.schedule import rate_share
from miss.engine.training.signals import ASKING, Interrupted, Signals
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
from miss.models.vqa import VQAOutput

_DROPOUT, _NEW_RANK = 21, 22  # what a hash is for

Validate = Callable[[nn.Module], dict[str, float]]
Export = Callable[[Path], None]


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
    """Sums since the last line of the log. A checkpoint holds them, so that a resumed run's next line is the same."""

    steps: int = 0
    loss: float = 0.0
    tokens: int = 0
    rows: int = 0
    images: int = 0
    flops: float = 0.0
    waited: float = 0.0
    started: float = 0.0
    norm: float = 0.0

    def paused(self) -> "Interval":
        """With the seconds so far as a start before 0, for another process's clock."""
        return replace(self, started=self.started - time.perf_counter())

    def going_on(self) -> "Interval":
        """The inverse of `paused`, by this process's clock."""
        return replace(self, started=self.started + time.perf_counter())


class Trainer:
    """One run in one output folder.

    Args:
        model: called as `model(batch, label_smoothing, seed)`; frozen parameters already say so.
        loader: the steps, by number.
        engine: makes the updates.
        config: the run; `config.schedule.total_steps` steps in all.
        output: `checkpoints/`, `best/`, `last/`, `log.jsonl`, `loss.png` and `summary.json` go here.
        validate: called on every rank with the averaged weights in the model, so that ranks may share the work; what
            it returns on rank 0 counts, `config.validation.metric` of it.
        export: writes the model, as it is when called, as a checkpoint folder for answering; all of it or nothing.
            Called on rank 0; its failure is all ranks'.
        copy: stands in for the model in validation and export, where the engine does not keep that one whole.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: GroupedLoader,
        engine: Engine,
        config: TrainConfig,
        output: Path,
        *,
        device: torch.device,
        validate: Validate | None = None,
        export: Export | None = None,
        ranks: Ranks = ALONE,
        copy: nn.Module | None = None,
    ) -> None:
        self.model, self.loader, self.engine, self.config, self.output = model, loader, engine, config, output
        self.device, self.validate, self.export = device, validate, export
        self.ranks, self.shown = ranks, model if copy is None else copy
        self.ema = Ema(self.shown, config.ema.decay) if config.ema.decay else None
        self.progress = Progress()
        self.store = CheckpointStore(output / "checkpoints", config.checkpoint.keep_last)
        self._interval = Interval()
        self._signals = Signals()
        self._agreed: int | None = None  # the signal that any of several ranks has got: known to all after each step
        self._ceiling: float | None = None
        self._saved = 0  # the step of the last checkpoint, written or read

    def fit(self, stop_at: int | None = None) -> dict[str, Any]:
        """Trains to the schedule's end, to an early stop, or to `stop_at` steps; saves; returns the summary.

        Raises:
            NotFinite: before the update that would have spoilt the weights; on all ranks.
            Stopped: on SIGTERM or SIGINT to any rank, after saving; on all ranks.
            CheckpointNotSaved: the disk is full; on all ranks.
            OtherFailed, RankLost: another rank ended, with or without a reason.
        """
        total = self.config.schedule.total_steps
        last = min(total, stop_at if stop_at is not None else total)
        started, first = time.perf_counter(), self.progress.step
        log = RunLog(self.output, total, first, self.config.log.tensorboard) if self.ranks.first else NoLog()
        self.model.train()
        try:
            with self._signalled():
                self._measure_ceiling(log)
                self._run(last, total, log)
                self._finish()
            summary = self._summary(first, time.perf_counter() - started)
            self.ranks.on_first(lambda: self._conclude(summary), alike=(CheckpointNotSaved,))
            return summary
        finally:
            log.close()

    def _run(self, last: int, total: int, log: RunLog) -> None:
        if self.progress.step and self._between_steps(self.progress.step, total, log):
            return  # what a signal kept the run from doing after its last step
        with closing(self.loader.steps(self.progress.step)) as steps:
            self._interval = self._interval.going_on()
            while self.progress.step < last:
                asked = time.perf_counter()
                work = next(steps)
                self._interval.waited += time.perf_counter() - asked
                self._step(work, self._interval)
                done = self.progress.step = self.progress.step + 1
                whole = done % self.config.log.every == 0
                if whole or done == last:
                    self._log(log, self._interval)
                if whole or done == total:
                    self._interval = Interval(started=time.perf_counter())
                paused = time.perf_counter()
                if self._between_steps(done, total, log):
                    return
                self._interval.started += time.perf_counter() - paused  # validation and saving are not the step's time

    def _between_steps(self, done: int, total: int, log: RunLog) -> bool:
        """Validation, checkpoint and signals that are due after a step; True where the run should stop early."""
        self._leave_if_signalled()
        validation, progress = self.config.validation, self.progress
        due = done == total or (validation.every and done % validation.every == 0)
        if self.validate is not None and due and progress.validated != done:
            self._validate(log)
        if 0 < validation.patience <= progress.worse_in_a_row:
            log.say(f"no better {validation.metric} in {progress.worse_in_a_row} validations: done")
            return True
        every = self.config.checkpoint.every
        if every and done % every == 0 and done != total and progress.step != self._saved:
            self.save()
        self._leave_if_signalled()
        return False

    def _step(self, work: Step, interval: Interval) -> None:
        config, index = self.config, work.index
        total = torch.zeros((), device=self.device)
        tokens, losses = torch.zeros((), dtype=torch.int64, device=self.device), []
        for number in range(len(work.parts)):
            loss, output = self._loss(work, number)
            self.engine.backward(loss, number == len(work.parts) - 1)
            total, tokens = total + loss.detach() / self.ranks.world_size, tokens + output.num_tokens.sum()
            losses.append(output.loss_per_row.detach())
        asked = torch.tensor([self._signals.number == name for name in ASKING], device=self.device).double()
        sums = self.ranks.reduce_sum(torch.cat([torch.stack([total.double(), tokens.double()]), asked]))
        # The step's one wait for the device: loss and norm must be known, to all ranks, before the update.
        value, count, *asking, norm = torch.cat([sums, self.engine.gradient_norm().double()[None]]).tolist()
        self._agreed = next((name for name, ranks in zip(ASKING, asking, strict=True) if ranks), None)
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise self._not_finite(work, losses, value, norm)
        self.engine.step(rate_share(index, config.schedule), config.optimizer.clip, norm)
        if self.ema is not None:
            self.ema.update(self.engine.values())
        interval.steps, interval.loss, interval.norm = interval.steps + 1, interval.loss + value, interval.norm + norm
        interval.tokens, interval.rows = interval.tokens + int(count), interval.rows + work.num_rows
        interval.images += work.num_images
        interval.flops += self._flops(work)

    def _loss(self, work: Step, number: int) -> tuple[Tensor, VQAOutput]:
        """A part's loss as the engine wants it, and what the model gave."""
        config, part = self.config, work.parts[number]
        batch = part.batch.to(self.device, non_blocking=True)
        seed = hash64(config.seed, _DROPOUT, work.index, work.first_part + number) >> 1
        with self._autocast():
            if batch.image_tokens is not None and not config.bf16:
                batch.image_tokens = batch.image_tokens.to(next(self.model.parameters()).dtype)
            output = self.engine(batch, config.label_smoothing, seed)
            return output.loss_per_row.sum() / work.num_rows * self.ranks.world_size, output

    def _flops(self, work: Step) -> float:
        model_config = getattr(self.model, "config", None)
        if model_config is None:
            return 0.0
        words = self.model.get_parameter("encoder.embeddings.word.weight").requires_grad
        vision = self.config.train_vision
        return sum(training_flops(model_config, part.batch, vision, words) for part in work.parts)

    def _not_finite(self, work: Step, losses: list[Tensor], value: float, norm: float) -> NotFinite:
        """Names the rows whose own loss is not finite, of all ranks; else those of the parts whose gradients are not;
        where these are finite when they are computed again, all of the step."""
        qids = [qid for part in work.parts for qid in part.qids]
        bad = (~torch.cat(losses).isfinite()).tolist()
        by_loss = [qid for qid, is_bad in zip(qids, bad, strict=True) if is_bad]
        by_gradient, parameters = self._again(work) if self.ranks.all_true(not by_loss) else ([], [])
        everyone = self.ranks.gather_objects(Suspects(by_loss, by_gradient, qids, parameters))
        what = f"loss {value}" if not math.isfinite(value) else f"gradient norm {norm}"
        step = work.index + 1
        if self.ranks.first:
            not_finite.write(everyone, step, what, self.output)
        return NotFinite(not_finite.describe(everyone, step, what, self.output))

    def _again(self, work: Step) -> tuple[list[str], list[str]]:
        """The step's passes once more, on all ranks: gradients are looked at before they are added up over ranks."""
        rows: list[str] = []
        names: set[str] = set()
        for number, part in enumerate(work.parts):
            with watched_gradients(self.model) as found:
                self.engine.backward(self._loss(work, number)[0], number == len(work.parts) - 1)
            bad = [name for name, is_bad in found.items() if is_bad]
            rows, names = rows + (part.qids if bad else []), names | set(bad)
        return rows, sorted(names)

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
                        own[name].copy_(value)
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
            self._signals.may_interrupt = self.ranks.world_size == 1  # nothing of the run's state changes meanwhile
            self._leave_if_signalled()
            metrics = self.ranks.broadcast_object(self.validate(self.shown))
            self._signals.may_interrupt = False
            if name not in metrics:
                raise ValueError(f"validation.metric: got {name!r}; validation gives {', '.join(metrics)}")
            value = metrics[name]
            better = progress.best is None or value > progress.best
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
        export, folder = self.export, self.output / name
        if export is None:
            return

        def write() -> None:
            with saving(folder):
                export(folder)

        self.ranks.on_first(write, alike=(CheckpointNotSaved,))

    def _finish(self) -> None:
        with self.averaged():
            self._export("last")
        self.save()

    def _log(self, log: RunLog, interval: Interval) -> None:
        seconds = max(time.perf_counter() - interval.started, 1e-9)
        step, rate = self.progress.step, self.config.optimizer.rate_new
        values: dict[str, Any] = {
            "loss": interval.loss / interval.steps,
            "loss_per_token": interval.loss / interval.steps * interval.rows / max(interval.tokens, 1),
            "gradient_norm": interval.norm / interval.steps,
            "rate_new": rate * rate_share(step - 1, self.config.schedule),
            "epoch": round(self.loader.sampler.epoch_of_step(step), 4),
            "samples_per_s": interval.rows / seconds,
            "images_per_s": interval.images / seconds,
            "s_per_step": seconds / interval.steps,
            "data_wait_share": interval.waited / seconds,
            "gflops_per_s": interval.flops / seconds / 1e9,
            "eta_s": (self.config.schedule.total_steps - step) * seconds / interval.steps,
        }
        if self._ceiling:
            values["ceiling_share"] = interval.flops / seconds / self._ceiling
        if self.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        log.write("train", step, values)
        log.progress(step, values)

    def _measure_ceiling(self, log: RunLog) -> None:
        if self.config.log.ceiling and self.ranks.first:
            self._ceiling = matmul_ceiling(self.device, torch.bfloat16 if self.config.bf16 else torch.float32)
            log.write("ceiling", self.progress.step, {"gflops_per_s": self._ceiling / 1e9})

    def _summary(self, first: int, seconds: float) -> dict[str, Any]:
        summary = {**asdict(self.progress), "total_steps": self.config.schedule.total_steps}
        return summary | {
            "metric": self.config.validation.metric,
            "resumed_from": first,
            "seconds": round(seconds, 1),
        }

    def _conclude(self, summary: dict[str, Any]) -> None:
        with saving(self.output / "summary.json"):
            draw_curves(self.output, self.config.validation.metric)
            write_json(self.output / "summary.json", summary)

    # ---- state ----

    def save(self) -> Path:
        """The whole state as a checkpoint of the present step: gathered from all ranks, written by the first.

        Raises:
            CheckpointNotSaved: on all ranks, with the reason of the first's disk; what was saved before is untouched.
        """
        weights, state, generators = self.engine.weights(), self.engine.state(), random_state()
        everyone = self.ranks.gather_objects(generators)

        def write(folder: Path) -> None:
            self._write(folder, weights, state, everyone)

        step, best = self.progress.step, self.progress.best_step
        path = self.ranks.on_first(lambda: self.store.save(step, write, best), alike=(CheckpointNotSaved,))
        self._saved = step
        return path

    def _write(
        self, folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], generators: list[Generators]
    ) -> None:
        save_tensors(weights | dict(self.model.named_buffers()), folder / "model.safetensors")
        if self.ema is not None:
            save_tensors(self.ema.average, folder / "average.safetensors")
        save_tensors(optimizer, folder / "optimizer.safetensors")
        save_random(folder, generators)
        state = {
            "progress": asdict(self.progress),
            "interval": asdict(self._interval.paused() if self._interval.steps else Interval()),
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
        self.ranks.on_first(lambda: verify(path), alike=(CheckpointCorrupt,))
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        check_same_run(TrainConfig.from_dict(state["config"]), self.config)
        tensors = load_file(path / "model.safetensors")
        load_model_tensors(self.shown, tensors)
        self.engine.load_weights(tensors)
        if self.ema is not None:
            self.ema.load(load_file(path / "average.safetensors"), state["average_updates"])
        self.engine.load_state(load_file(path / "optimizer.safetensors"))
        self.progress = Progress(**state["progress"])
        self._interval = Interval(**state.get("interval", {}))  # runs of before had none
        if not load_random(path, self.ranks.rank):
            seed_everything(hash64(self.config.seed, _NEW_RANK, self.progress.step, self.ranks.rank))
        self._saved = self.progress.step

    # ---- signals ----

    @contextmanager
    def _signalled(self) -> Iterator[None]:
        try:
            with self._signals.caught():
                yield
        except Interrupted:
            self._leave_if_signalled()

    def _leave_if_signalled(self) -> None:
        """Saves and leaves where a signal asked for it: this process, or, after a step, any of several ranks."""
        number = self._signals.number if self.ranks.world_size == 1 else self._agreed
        if number is None:
            return
        with self.averaged():
            self._export("last")
        path = self.save()
        if self.ranks.first:
            print(f"{signal.Signals(number).name}: saved {path}; go on with --resume auto", flush=True)
        raise Stopped(128 + number)
