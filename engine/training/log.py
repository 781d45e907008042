"""What a run says while it goes: a progress line, `log.jsonl`, TensorBoard, and a picture of its curves at the end.

Knows numbers and files; does not know the model or the loop.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from miss.engine.training.checkpoint import write_atomic

LOG = "log.jsonl"


class RunLog:
    """Writes one run's log; a resumed run's continues it, without what came after the step it resumes from."""

    def __init__(self, output: Path, total_steps: int, first_step: int, tensorboard: bool) -> None:
        self.output, self.total_steps = output, total_steps
        output.mkdir(parents=True, exist_ok=True)
        cut_log(output / LOG, first_step)
        self._file = open(output / LOG, "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=first_step + 1)  # type: ignore[no-untyped-call]
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line: `{"kind", "step", …}`. Numbers go to TensorBoard too, under `kind/name`."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)  # type: ignore[no-untyped-call]

    def progress(self, step: int, values: dict[str, Any], unit: str = "samples") -> None:
        """Where the run is, for people: loss (and its parts), samples or pairs a second, time left."""
        left, rate = clock(values["eta_s"]), values[f"{unit}_per_s"]
        parts = {k.removeprefix("loss_"): v for k, v in values.items() if k.startswith("loss_")}
        parts.pop("per_token", None)
        apart = f" ({', '.join(f'{k} {v:.2f}' for k, v in parts.items())})" if parts else ""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}{apart}, {rate:.1f} {unit}/s, {left} left")
        else:
            share = f", {values['ceiling_share']:.0%} of the matrix product rate" if "ceiling_share" in values else ""
            self.say(
                f"step {step}/{self.total_steps}  loss {values['loss']:.4f}{apart}  {rate:.1f} {unit}/s"
                f"{share}  {left} left"
            )

    def say(self, text: str) -> None:
        """A line of its own, above the progress bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()  # type: ignore[no-untyped-call]
        if self._bar is not None:
            self._bar.close()


class NoLog(RunLog):
    """The log of every rank but the first: nothing."""

    def __init__(self) -> None: ...

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None: ...

    def progress(self, step: int, values: dict[str, Any], unit: str = "samples") -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; one that a crash cut short (it can only be the last) is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def cut_log(path: Path, last_step: int) -> None:
    """Drops what was logged after `last_step`."""
    if path.is_file():
        kept = [line for line in read_log(path) if line["step"] <= last_step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def draw_curves(output: Path, metric: str, label: str) -> Path | None:
    """`loss.png`: training loss, its parts and the validation metric over the steps; None where nothing was logged.

    label: what the loss is, in words."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_log(output / LOG)
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    parts: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name in line if line["kind"] == "train" else ():
            if name.startswith("loss_") and name != "loss_per_token":
                parts.setdefault(name.removeprefix("loss_"), []).append((line["step"], line[name]))
    validation = [(line["step"], line[metric]) for line in lines if line["kind"] == "validation" and metric in line]
    if not train:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.plot(*zip(*train, strict=True), color="tab:blue", label="training loss")
    for name, points in parts.items():
        axis.plot(*zip(*points, strict=True), linewidth=1, label=name)
    axis.set(xlabel="step", ylabel=label, ylim=(0, None))
    if validation:
        other = axis.twinx()
        other.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label=f"validation {metric}")
        other.set(ylabel=f"validation {metric}", ylim=(0, 1))
        other.legend(loc="center right")
    axis.legend(loc="upper right")
    figure.tight_layout()
    path = output / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
