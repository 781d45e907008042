"""The training loop's engine over DeepSpeed's ZeRO, stages 0 to 3: the only file that knows DeepSpeed.

Knows how DeepSpeed shards, accumulates, measures and clips, and where its masters and moments lie; does not know the
model's inputs, the schedule or files: state comes out whole, by parameter name, so that any stage and number of ranks
(and the plain engine) goes on with it, and nothing is ever unpickled.

Run on CPU over gloo, 1 and 2 ranks (docs/zero.md); never run here on CUDA.
"""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miss.engine.training.opened import Opened, put_back
from miss.engine.training.optimizer import build_optimizer, by_parameter, check_kind
from miss.engine.training.plain import check_same_start, load_whole_state, value_of, whole_state
from miss.engine.training.ranks import ALONE, Ranks
from miss.engine.training.timed_calls import time_calls
from miss.engine.training.zero_config import RunFacts, filled, keeps_whole

# DeepSpeed's collective calls, as its backend names them.
_CALLS = (
    *("all_reduce", "reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "all_gather_coalesced"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all_single", "inference_all_reduce", "all_reduce_coalesced"),
)
_CHUNK = 1 << 26  # numbers that are whole at once where parameters are gathered for others to read: 256 MB


class Flat(NamedTuple):
    """A parameter group of stages 1 and 2: its parameters lie in `lent` one behind another; each rank holds the float32
    masters, and the moments, of its own equal `part` of that."""

    lent: Tensor
    part: Tensor
    parameters: list[nn.Parameter]


class ZeroEngine:
    """DeepSpeed ZeRO of any stage, on any number of ranks.

    What is given to it is the optimiser of `build_optimizer`; clipping and rates are the loop's. With `bf16` the model
    becomes bfloat16 at stages 1 to 3, with float32 masters and moments; at stage 0 it stays float32 under the loop's
    autocast, as with the plain engine (DeepSpeed alone would add up the parts' gradients in bfloat16).

    Args:
        run: what DeepSpeed's configuration is held against.
        given: a DeepSpeed configuration; what it leaves out is filled in.

    Raises:
        ConfigError: `given` contradicts the run.
        ModuleNotFoundError: deepspeed is not installed.
    """

    def __init__(
        self, model: nn.Module, run: RunFacts, ranks: Ranks = ALONE, given: Mapping[str, Any] | None = None
    ) -> None:
        config = filled(given or {}, run)
        self.stage, self.bf16 = int(config["zero_optimization"]["stage"]), bool(config["bf16"]["enabled"])
        self.ranks, self.whole, self._model = ranks, keeps_whole(self.stage, self.bf16), model
        check_same_start(model, ranks)
        self._scalars = _as_vectors(model)
        self._names = {id(p): name for name, p in model.named_parameters()}
        # A cast model keeps what is not trained in halves: what is saved is what it was.
        self._frozen = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = build_optimizer(model, run.optimizer)
        self._base_rates = [group["base_rate"] for group in optimizer.param_groups]
        self._opened = Opened(model)
        library = _deepspeed(ranks)
        quiet = contextlib.redirect_stdout(io.StringIO())  # it prints the memory before and after each group
        with quiet, ranks.watched("starting DeepSpeed", talk=False):
            self._engine: Any = library.initialize(
                model=self._opened, optimizer=optimizer, dist_init_required=False, config=config
            )[0]
        self._zero: Any = self._engine.optimizer
        if self.stage == 3:
            _keep_recomputed(self._zero.parameter_offload)
        self._plain = self.stage == 0  # DeepSpeed then only averages gradients

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.ranks.watched("the forward pass", talk=False):
            tensors = self._engine(*args, **kwargs)
        return put_back(self._opened.shape, tensors)

    def backward(self, loss: Tensor, last: bool) -> None:
        with self.ranks.watched("the backward pass", talk=False):
            self._engine.backward(loss, scale_wrt_gas=False)
            if not last:
                self._engine.step()  # moves DeepSpeed to the next part; updates nothing before the last

    def gradient_norm(self) -> Tensor:
        """DeepSpeed reports a norm that is not finite as -1 or infinite."""
        with self.ranks.watched("the norm of gradients", talk=False):
            norm = torch.as_tensor(self._norm(), dtype=torch.float32, device=self.ranks.device)
        return torch.where(norm < 0, torch.full_like(norm, float("nan")), norm)

    def _norm(self) -> Any:
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        if self._plain:
            return nn.utils.get_total_norm(self._gradients(), foreach=True)
        if hasattr(self._zero, "get_grads_for_norm"):
            return get_global_norm_of_tensors(self._zero.get_grads_for_norm()[0])
        if self.stage == 3:
            return combine_grad_norm_groups(self._zero._get_norm_groups())
        return self._zero.scaled_global_norm()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._model.parameters() if p.grad is not None]

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        if not self._plain:
            self._zero.clip_grad = max_norm
        elif 0 < max_norm < norm:
            torch._foreach_mul_(self._gradients(), max_norm / norm)
        for group, rate in zip(self._zero.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * rate_share
        with self.ranks.watched("the update", talk=False):
            self._engine.step()

    # ---- whole values ----

    @torch.no_grad()
    def values(self, names: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
        wanted = [p for p in self._trained() if names is None or self._names[id(p)] in names]
        with self.ranks.watched("gathering weights"):
            if self.stage == 3:
                yield from self._gathered(wanted)
            elif not self.bf16:
                yield {self._names[id(p)]: p.detach() for p in wanted}
            else:
                chosen = {id(p) for p in wanted}
                for flat in self._flats():
                    whole = self._whole(flat.part)
                    held = {self._names[id(p)]: cut for p, cut in _cuts(flat, whole) if id(p) in chosen}
                    if held:
                        yield held

    def _gathered(self, wanted: list[nn.Parameter]) -> Iterator[dict[str, Tensor]]:
        """Stage 3: float32 parameters are their own masters, some at once; a half's masters come one after another."""
        import deepspeed

        for chunk in _chunks(wanted):
            if self.bf16:
                yield {self._names[id(p)]: self._zero.get_full_hp_param(p).view(p.ds_shape) for p in chunk}  # type: ignore[attr-defined]
                continue
            with deepspeed.zero.GatheredParameters(chunk):
                yield {self._names[id(p)]: p.detach() for p in chunk}

    def weights(self) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for values in self.values():
            if self.ranks.first:
                held |= {name: self._kept(name, value.float()) for name, value in values.items()}
        frozen = self._frozen.items() if self.ranks.first else ()
        return held | {name: value.clone() for name, value in frozen}

    def _kept(self, name: str, value: Tensor) -> Tensor:
        """A copy on the CPU, of the shape that the model gives the parameter."""
        return value.cpu().clone().reshape(() if name in self._scalars else value.shape)

    @torch.no_grad()
    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        self._frozen = {name: tensors[name].float() for name in self._frozen}
        if self.stage == 3:
            self._load_sharded(tensors)
            return
        for p in self._model.parameters():
            p.copy_(tensors[self._names[id(p)]])
        for flat in self._flats():
            self._fill(flat, flat.part, {id(p): tensors[self._names[id(p)]] for p in flat.parameters})

    def _load_sharded(self, tensors: dict[str, Tensor]) -> None:
        import deepspeed

        for chunk in _chunks(list(self._model.parameters())):
            with deepspeed.zero.GatheredParameters(chunk, modifier_rank=0):
                for p in chunk:
                    p.copy_(tensors[self._names[id(p)]])
        for p in self._trained():
            self._place(p, self._zero.fp32_partitioned_groups_flat, tensors[self._names[id(p)]])

    # ---- the optimiser's state ----

    def state(self) -> dict[str, Tensor]:
        with self.ranks.watched("gathering the optimiser's state"):
            if self._plain:
                held = whole_state(self._zero, self._names) if self.ranks.first else {}
                return {key: self._kept(key.partition("/")[2], value) for key, value in held.items()}
            return dict(self._state())

    @torch.no_grad()
    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for i, (part, parameters) in enumerate(self._parts()):
            held = self._optimizer.state.get(part, {})
            for kind, value in held.items():
                if "state1" in held:  # 8-bit codes and their scales belong to this cut of the weights
                    yield from self._shards(i, kind, torch.as_tensor(value))
                elif kind == "step":
                    yield from ((f"step/{self._names[id(p)]}", value.cpu().clone()) for p in parameters)
                else:
                    yield from self._moments(i, kind)

    def _moments(self, i: int, kind: str) -> Iterator[tuple[str, Tensor]]:
        if self.stage == 3:
            pairs: Iterable[tuple[nn.Parameter, Tensor]] = (
                (p, self._zero.get_full_hp_param(p, kind).view(p.ds_shape)) for p in self._zero.fp16_groups[i]
            )
        else:
            flat = self._flats()[i]
            pairs = _cuts(flat, self._whole(self._optimizer.state[flat.part][kind]))
        for p, value in pairs:
            if self.ranks.first:
                yield f"{kind}/{self._names[id(p)]}", self._kept(self._names[id(p)], value)

    def _shards(self, i: int, kind: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        everyone = self.ranks.gather(value[None].to(self.ranks.device))[0].cpu()
        for rank, shard in enumerate(everyone):
            if self.ranks.first:
                yield f"shard/{self._cut}/{rank}/{i}/{kind}", shard.clone()

    @property
    def _cut(self) -> str:
        return f"stage {self.stage} on {self.ranks.world_size} ranks"

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if any(key.startswith("shard/") for key in tensors):
            self._load_shards(tensors)
            return
        if self._plain:
            shaped = {k: v.reshape(1) if _is_moment(k, self._scalars) else v for k, v in tensors.items()}
            load_whole_state(self._zero, self._names, shaped)
            return
        by_name = by_parameter(tensors, [self._names[id(p)] for p in self._trained()])
        for i, (part, parameters) in enumerate(self._parts()):
            saved = {id(p): by_name[self._names[id(p)]] for p in parameters if self._names[id(p)] in by_name}
            if saved:  # none: no update was made yet
                self._load_part(i, part, parameters, saved)

    def _load_part(
        self, i: int, part: Tensor, parameters: list[nn.Parameter], saved: dict[int, dict[str, Tensor]]
    ) -> None:
        """A parameter that the plain engine never moved counts as moved with gradients of 0 here."""
        some = next(iter(saved.values()))
        check_kind(some, self._optimizer)
        steps = torch.stack([held["step"] for held in saved.values()]).max()
        state: dict[str, Any] = {"step": value_of("step", steps, part.device)}
        state |= {kind: torch.zeros_like(part) for kind in some if kind != "step"}
        self._optimizer.state[part] = state
        for kind in state.keys() - {"step"}:
            if self.stage == 3:
                buffers = {j: state[kind] if j == i else None for j in range(i + 1)}
                for p in parameters:
                    if id(p) in saved:
                        self._place(p, buffers, saved[id(p)][kind])
            else:
                held = {key: values[kind] for key, values in saved.items()}
                self._fill(self._flats()[i], state[kind], held)

    def _load_shards(self, tensors: dict[str, Tensor]) -> None:
        prefix = f"shard/{self._cut}/{self.ranks.rank}/"
        mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not mine:
            theirs = next(iter(tensors)).split("/")[1]
            raise ValueError(
                f"the saved 8-bit moments are cut for ZeRO {theirs}; here is {self._cut}. Go on as it was, or with "
                f"optimizer.name: adamw, whose state fits any stage and number of ranks"
            )
        for i, (part, _) in enumerate(self._parts()):
            kinds = {key.split("/")[1]: value for key, value in mine.items() if key.startswith(f"{i}/")}
            check_kind(kinds, self._optimizer)
            self._optimizer.state[part] = {kind: value_of(kind, v, part.device) for kind, v in kinds.items()}

    # ---- where things lie ----

    @property
    def _optimizer(self) -> Any:
        return self._zero.optimizer

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _parts(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """What the inner optimiser updates on this rank, and whose parameters these are pieces of."""
        if self.stage == 3:
            return list(zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True))
        return [(flat.part, flat.parameters) for flat in self._flats()]

    def _flats(self) -> list[Flat]:
        zero = self._zero
        if self._plain:
            return []
        if hasattr(zero, "bf16_groups_flat"):  # what DeepSpeed makes of stage 1 with halves
            triples = zip(zero.bf16_groups_flat, zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
        else:
            triples = zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        return [Flat(*triple) for triple in triples]

    def _whole(self, part: Tensor) -> Tensor:
        part = part.detach().to(self.ranks.device).contiguous()
        if self.ranks.world_size == 1:
            return part
        whole = part.new_empty(part.numel() * self.ranks.world_size)
        dist.all_gather_into_tensor(whole, part)
        return whole

    def _fill(self, flat: Flat, part: Tensor, values: Mapping[int, Tensor]) -> None:
        """This rank's piece of the values (by id of parameter; 0 where there is none) into `part`."""
        whole = torch.zeros(flat.lent.numel(), dtype=part.dtype, device="cpu")
        for p, cut in _cuts(flat, whole):
            if id(p) in values:
                cut.copy_(values[id(p)])
        size = part.numel()
        part.data.copy_(whole[self.ranks.rank * size : (self.ranks.rank + 1) * size])

    def _place(self, p: nn.Parameter, buffers: Any, value: Tensor) -> None:
        """Stage 3: this rank's piece of a whole value into the flat buffer of its group (masters or moments)."""
        group, offset, size = self._zero.grad_position[self._zero.get_param_id(p)]
        flat = value.flatten()
        start = self.ranks.rank * size
        piece = flat[start : start + size]
        buffers[group].data.narrow(0, offset, len(piece)).copy_(piece)


def _keep_recomputed(offload: Any) -> None:
    """Stage 3: a layer that the backward pass computes again keeps its weights until the update. Released right after,
    they would have no size when their gradients arrive, which then fit nowhere."""
    release = offload.post_sub_module_forward_function

    def release_unless_in_backward(module: nn.Module) -> None:
        if torch._C._current_graph_task_id() == -1:
            release(module)

    offload.post_sub_module_forward_function = release_unless_in_backward


def _cuts(flat: Flat, whole: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter's piece of a tensor that is laid out as the group is, by where it lies in the lent memory."""
    for p in flat.parameters:
        start = p.data.storage_offset() - flat.lent.storage_offset()
        yield p, whole[start : start + p.numel()].view(p.shape)


def _is_moment(key: str, names: Collection[str]) -> bool:
    kind, _, name = key.partition("/")
    return kind != "step" and name in names


def _as_vectors(model: nn.Module) -> set[str]:
    """Replaces parameters without a dimension by vectors of one, which DeepSpeed can send (it views them as bytes); the
    names of these."""
    scalars = {name for name, p in model.named_parameters() if not p.dim()}
    for name in scalars:
        module, _, own = name.rpartition(".")
        scalar = model.get_parameter(name)
        vector = nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad)
        setattr(model.get_submodule(module), own, vector)
    return scalars


def _chunks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    numbers = 0
    for p in parameters:
        size = getattr(p, "ds_numel", p.numel())
        if chunk and numbers + size > _CHUNK:
            yield chunk
            chunk, numbers = [], 0
        chunk.append(p)
        numbers += size
    if chunk:
        yield chunk


def _deepspeed(ranks: Ranks) -> Any:
    """The library, over the process group of these ranks (also of one)."""
    for name, value in (("RANK", ranks.rank), ("WORLD_SIZE", ranks.world_size), ("LOCAL_RANK", ranks.local_rank)):
        os.environ.setdefault(name, str(value))
    ranks.join()
    deepspeed = _imported(ranks.device.type)
    deepspeed.utils.logger.setLevel("WARNING")
    if ranks.device.type == "cpu":  # its shared-memory reduction is compiled on first use (35 s, and a compiler)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    backend = deepspeed.comm.comm.cdb
    # Groups of its own would wait PyTorch's half hour for a rank that is gone, whatever the limit of these ranks.
    backend.new_group = functools.partial(dist.new_group, timeout=timedelta(seconds=ranks.timeout))
    time_calls(backend, _CALLS, ranks.clock)
    return deepspeed


def _imported(device_type: str) -> Any:
    """The library, whose words go to the standard error: the standard output is the command's."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
    return deepspeed


def estimates(num_parameters: int, largest_layer: int, world_size: int, device_type: str) -> dict[str, int]:
    """DeepSpeed's own estimators: bytes of model states on a device, of halves with float32 masters, no offload."""
    _imported(device_type)
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    two = estimate_zero2_model_states_mem_needs(num_parameters, world_size, 1, cpu_offload=False)
    three = estimate_zero3_model_states_mem_needs(
        num_parameters, largest_layer, world_size, 1, cpu_offload=False, cpu_offload_params=False, zero_init=False
    )
    return {"zero 2": int(two[1]), "zero 3": int(three[1])}
