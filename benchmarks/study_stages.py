"""A chain's stages as processes of their own: one that ends early ends the chain in one line, with its exit status.

Knows commands, signals and exit statuses; does not know what a stage does.
"""

import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT)


class StageEnded(ValueError):
    """A stage did not come to its end. `exit_code`: what it left with; of a signal 128 + its number, as shells say."""

    def __init__(self, stage: str, status: int) -> None:
        name = next((s.name for s in signal.Signals if s == status - 128), None)
        how = f"was ended by {name}" if name else "failed, its reason is above"
        super().__init__(f"stage {stage} {how} (exit status {status}); run the same command to go on")
        self.exit_code = status


class Watch:
    """SIGTERM and SIGINT to this process while a stage runs: the stage is asked to end (training saves first) and
    waited for. `stage`: the present one; `number`: the signal that came, if any."""

    def __init__(self) -> None:
        self.stage, self.number = "start", 0
        self._runs = False  # a stage, whose process may still be in the making: it would be left behind
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Inside, the two signals are handled so."""
        before = {name: signal.signal(name, self._ask) for name in _ASKING}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def run(self, stage: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Runs a stage's command and waits for its end, whatever signal comes.

        Raises:
            StageEnded: it left with another status than 0, or a signal came meanwhile.
        """
        self.stage, self._runs = stage, True
        try:
            process = self._process = subprocess.Popen(command, env=environment)
            if self.number:  # it came while the process was made
                process.send_signal(signal.SIGTERM)
            code = process.wait()
        finally:
            self._process, self._runs = None, False
        if code:
            raise StageEnded(stage, 128 + self.number if self.number else code if code > 0 else 128 - code)

    def leave_if_asked(self) -> None:
        """Behind a stage that came to its end all the same.

        Raises:
            StageEnded: a signal came.
        """
        if self.number:
            raise StageEnded(f"{self.stage} (which is done)", 128 + self.number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM is handed on for either: Ctrl-C reaches the stage by itself, and a second SIGINT would cut its save
        off. Where no process is waited for, the chain's own work ends here."""
        self.number = number
        if not self._runs:
            raise StageEnded(self.stage, 128 + number)
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
