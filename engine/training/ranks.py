"""The processes of a run: which one this is, and what they say to each other.

Knows launchers' environments, process groups and collective calls on tensors and small objects; does not know models,
engines or data.

Every method is called by all ranks, in the same order. Where one ends or stays away the others do not wait for ever:
once its connections close (gloo: at once) or the time is up they raise `OtherFailed` with the reason that it left on
the board, or `RankLost` where it left none.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from miss.engine.training.board import ENDED_EARLY, Board, Cause, agree_on_attempt, exit_code

T = TypeVar("T")

# Where srun's processes meet: a port that follows from the numbers of job and step, below those that systems hand out.
_FIRST_PORT, _NUM_PORTS, _STEPS = 20000, 12000, 8


class LauncherError(ValueError):
    """The environment does not say, or contradicts itself about, which process this is."""


class RankLost(ValueError):
    """Another process of the run ended without a word, or did not arrive in time."""

    exit_code = ENDED_EARLY


class OtherFailed(ValueError):
    """Another rank ended, and said why; this one leaves with the same exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = code


class FirstFailed(OtherFailed):
    """What rank 0 does for all went wrong there."""


@dataclass(frozen=True)
class Place:
    """What a launcher says: this process's rank of so many, its rank on this machine, and where all meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    meet: tuple[str, int] | None = None  # host and port; None: torchrun's own variables say it, or nobody meets


def place_from(environment: Mapping[str, str]) -> Place:
    """torchrun and deepspeed (RANK, WORLD_SIZE, LOCAL_RANK), srun (SLURM_PROCID, …), or alone.

    Raises:
        LauncherError: some of these are missing, or are no ranks.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, size, local = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return _checked(Place(rank, size, local), environment)
    # Inside a batch script, but not under srun, there is no SLURM_STEP_NUM_TASKS: one process, which is alone.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        rank, size, local = (_number(environment, name) for name in names)
        meet = (
            environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
            _port(environment),
        )
        return _checked(Place(rank, size, local, meet if size > 1 else None), environment)
    return Place()


def first_host(names: str) -> str:
    """The first of Slurm's `a[01-04,7],b`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?", names)
    return "127.0.0.1" if match is None else match.group(1) + (match.group(2) or "")


def _port(environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environment:
        return _number(environment, "MASTER_PORT")
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST_PORT + (job * _STEPS + step) % _NUM_PORTS


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdigit():
        raise LauncherError(
            f"{name}: got {value!r}; wanted a whole number, as torchrun, deepspeed or srun sets it beside RANK or "
            f"SLURM_PROCID (unset both to run alone)"
        )
    return int(value)


def _checked(place: Place, environment: Mapping[str, str]) -> Place:
    if not (0 <= place.rank < place.world_size and place.local_rank < place.world_size):
        raise LauncherError(
            f"got rank {place.rank} (here {place.local_rank}) of {place.world_size}; wanted one below it"
        )
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in environment]
    if place.world_size > 1 and place.meet is None and missing:
        raise LauncherError(f"{' and '.join(missing)}: not set; wanted where {place.world_size} processes meet")
    return place


class TalkClock:
    """Seconds that this process spent in collective calls, waiting for the others included."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time inside; once where calls are nested."""
        if self._inside:
            yield
            return
        self._inside, started = True, time.perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.seconds += time.perf_counter() - started


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. `first` (rank 0) is who writes and prints.

    with Ranks.from_environment() as ranks: …
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    timeout: float = 1800.0
    board: Board = field(default_factory=Board, compare=False, repr=False)
    clock: TalkClock = field(default_factory=TalkClock, compare=False, repr=False)

    @classmethod
    def from_environment(cls, device: str = "auto", timeout: float = 1800.0) -> "Ranks":
        """Joins the processes that the environment speaks of, over NCCL on CUDA, else over gloo.

        Args:
            device: auto, cpu or cuda; each rank takes the CUDA device of its number on this machine.
            timeout: seconds that a collective call, and joining, may take.

        Raises:
            LauncherError: the environment contradicts itself, or there are fewer devices than ranks here.
            RankLost: not all processes came in time.
        """
        place = place_from(os.environ)
        here = _device(device, place)
        ranks = cls(place.rank, place.world_size, place.local_rank, here, timeout)
        if place.world_size > 1 and not dist.is_initialized():
            if place.meet is not None:
                os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.meet[0], str(place.meet[1])
            ranks.join()
        return ranks

    def join(self) -> None:
        """Starts the process group, also of one process (DeepSpeed wants one)."""
        if dist.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=self.timeout)
        with self.watched("joining"):
            store = dist.HashStore() if self.world_size == 1 else self._meet(limit)
            dist.init_process_group(backend, rank=self.rank, world_size=self.world_size, timeout=limit, store=store)

    def _meet(self, limit: timedelta) -> dist.Store:
        """The store that all connect to: torchrun holds it, or else rank 0. The board has a connection of its own."""
        stores = [next(dist.rendezvous("env://", self.rank, self.world_size, timeout=limit))[0] for _ in range(2)]
        name = agree_on_attempt(dist.PrefixStore("miss", stores[0]), self.rank, self.world_size, self.timeout)
        host = self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.board.open(dist.PrefixStore(f"board/{name}", stores[1]), self.rank, self.world_size, host)
        return dist.PrefixStore(f"ranks/{name}", stores[0])

    def leave(self, error: BaseException | None = None) -> None:
        """Ends the process group; what follows is on its own. After an error the others learn its words first."""
        failed = error is not None and not isinstance(error, SystemExit)  # an agreed stop: all know
        if failed and error is not None:
            words = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            self.board.post(Cause(self.rank, " ".join(words.split()), exit_code(error), isinstance(error, RankLost)))
        else:
            self.board.close(wait=False)
        # NCCL would wait for operations that cannot end any more; the end of the process closes its connections.
        if dist.is_initialized() and not (failed and self.device.type == "cuda"):
            dist.destroy_process_group()
        self.board.close(wait=failed)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """A library's own call to another rank that failed is reported as those of this class are."""
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        if lost and self.world_size > 1:
            assert isinstance(error, RuntimeError)
            told = self._lost("a call to the others", 0.0, error)
            self.leave(told)
            raise told from error
        self.leave(error)

    @property
    def first(self) -> bool:
        return self.rank == 0

    # ---- what all ranks do together ----

    def gather(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows (R, …) of every rank, one behind another in the order of ranks, and where this rank's start.

        Ranks may hold different numbers of rows, also none. Bits travel, so that every dtype arrives as it was.
        """
        if self.world_size == 1:
            return rows, 0
        with self.watched("gathering rows"):
            counts = self._counts(len(rows))
            row_bytes = math.prod(rows.shape[1:]) * rows.element_size()
            mine = torch.zeros(max(counts) * row_bytes, dtype=torch.uint8, device=self.device)
            mine[: len(rows) * row_bytes] = rows.detach().contiguous().flatten().view(torch.uint8)
            everyone = [torch.empty_like(mine) for _ in counts]
            dist.all_gather(everyone, mine)
        flat = torch.cat([part[: n * row_bytes] for part, n in zip(everyone, counts, strict=True)])
        return flat.view(rows.dtype).reshape(sum(counts), *rows.shape[1:]), sum(counts[: self.rank])

    def _counts(self, count: int) -> list[int]:
        own = torch.tensor([count], dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        return [int(n) for n in torch.cat(everyone).tolist()]

    def reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, a new tensor: the same bits everywhere."""
        total = values.detach().clone()
        if self.world_size > 1:
            with self.watched("a sum"):
                dist.all_reduce(total)
        return total

    def all_true(self, flag: bool) -> bool:
        """Whether it is true on every rank."""
        if self.world_size == 1:
            return flag
        return int(self.reduce_sum(torch.tensor(int(flag), device=self.device))) == self.world_size

    def barrier(self) -> None:
        """Goes on when all ranks are here."""
        if self.world_size > 1:
            with self.watched("a barrier"):
                dist.all_reduce(torch.zeros(1, device=self.device))

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The small plain value that `source` holds. Our own processes send it, no file and no stranger."""
        if self.world_size == 1:
            return value
        held: list[Any] = [value]
        with self.watched("a broadcast"):
            dist.broadcast_object_list(held, source, device=self.device)
        return held[0]  # type: ignore[no-any-return]

    def gather_objects(self, value: T) -> list[T]:
        """The small plain values of all ranks, in their order."""
        if self.world_size == 1:
            return [value]
        held: list[Any] = [None] * self.world_size
        with self.watched("gathering objects"):
            dist.all_gather_object(held, value)
        return held

    def on_first(self, work: Callable[[], T], alike: tuple[type[ValueError], ...] = ()) -> T:
        """What `work` gives on rank 0, everywhere; the others do not run it, and fail where it fails.

        Args:
            alike: errors that are raised on the others as what they are (made from a message alone).

        Raises:
            FirstFailed: on the others, with the words of the error that rank 0 raises, where it is none of these.
        """
        if not self.first:
            value, failure = self.broadcast_object((None, None))
            if failure is not None:
                raise _failure_of_first(*failure, alike)  # type: ignore[misc]
            return value  # type: ignore[no-any-return, return-value]
        try:
            value = work()
        except Exception as error:
            number = next((i for i, kind in enumerate(alike) if isinstance(error, kind)), None)
            self.broadcast_object((None, (number, str(error) or type(error).__name__, exit_code(error))))
            raise
        return self.broadcast_object((value, None))[0]

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 goes through the block first, the others after it: they find what it has put into a cache."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    @contextlib.contextmanager
    def watched(self, what: str, talk: bool = True) -> Iterator[None]:
        """Turns a failed collective call inside into words on what was waited for, how long, and who is missing.

        talk: whether all of the time inside is communication; an engine that also computes there counts its own.

        Raises:
            OtherFailed: a rank ended and left its reason.
            RankLost: one was killed, or does not answer.
        """
        started = time.monotonic()
        try:
            with self.clock.running() if talk else contextlib.nullcontext():
                yield
        except RuntimeError as error:
            if self.world_size == 1 or not _of_connections(error):
                raise
            raise self._lost(what, time.monotonic() - started, error) from error

    def _lost(self, what: str, seconds: float, error: RuntimeError) -> RankLost | OtherFailed:
        self.board.post(Cause(self.rank, f"lost another rank at {what}", ENDED_EARLY, lost=True))
        causes = self.board.causes()
        said = {rank: cause for rank, cause in causes.items() if not cause.lost}
        if said:
            words = "; ".join(f"rank {rank} failed: {cause.words}" for rank, cause in sorted(said.items()))
            return OtherFailed(words, next(cause.code for _, cause in sorted(said.items())))
        silent = [str(r) for r in range(self.world_size) if r != self.rank and r not in causes]
        who = f"rank {', '.join(silent)} was killed or stands still" if silent else "a connection broke"
        after = f" after {seconds:.1f} s" if seconds else ""
        return RankLost(
            f"rank {self.rank} of {self.world_size}: {what} failed{after}; {who} (another rank ended, "
            f"or did not come within {self.timeout:.0f} s). Start again with --resume auto "
            f"({str(error).splitlines()[0][:200]})"
        )


def _failure_of_first(number: int | None, words: str, code: int, alike: tuple[type[ValueError], ...]) -> ValueError:
    return FirstFailed(f"rank 0 failed: {words}", code) if number is None else alike[number](words)


def _of_connections(error: RuntimeError) -> bool:
    words = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _device(name: str, place: Place) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        if place.world_size > 1:
            raise LauncherError(f"device: got {name!r} for {place.world_size} processes; accepted: auto, cpu, cuda")
        try:
            return torch.device(name)
        except RuntimeError:
            raise LauncherError(f"device: got {name!r}; accepted: auto, cpu, cuda, cuda:N") from None
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise LauncherError(
            f"device: {torch.cuda.device_count()} CUDA devices here, this is process {place.local_rank} of this "
            f"machine; start one process a device, and let each see all devices (srun: without --gpus-per-task)"
        )
    if place.world_size == 1:
        return torch.device("cuda")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


ALONE = Ranks()
