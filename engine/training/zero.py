"""The training loop's engine over DeepSpeed's ZeRO: the only file that knows DeepSpeed.

Knows how DeepSpeed accumulates, measures, clips, saves; does not know the model's inputs or the schedule. ZeRO-1 and
ZeRO-2 with PyTorch's own AdamW, weights in float32 (under the loop's autocast), one process: the loader gives every
process the same steps, so that more of them are refused until it shards.

Run on CPU over gloo, where 10 steps equal the plain engine's (tests/engine/test_zero.py); never run here on CUDA.
"""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miss.engine.training.config import OptimizerConfig
from miss.engine.training.optimizer import build_adamw

_TAG = "zero"


class ZeroEngine:
    """DeepSpeed ZeRO stage 1 or 2 in one process.

    The loss that comes in is already the part's share of the step's, so that DeepSpeed's own division by the number of
    parts is turned off, and clipping happens here once the loop has seen that the norm is finite.

    Raises:
        ValueError: more than one process, or another stage.
        ModuleNotFoundError: deepspeed is not installed.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, num_parts: int = 1, stage: int = 2) -> None:
        if stage not in (1, 2):
            raise ValueError(f"ZeRO stage: got {stage}; accepted: 1, 2")
        if int(os.environ.get("WORLD_SIZE", "1")) != 1:
            raise ValueError(
                f"engine zero: got WORLD_SIZE={os.environ['WORLD_SIZE']}; accepted: 1 (every process would train on "
                f"the same questions)"
            )
        device = next(model.parameters()).device
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        import deepspeed

        _start_group("nccl" if device.type == "cuda" else "gloo")
        adamw = build_adamw(model, config)
        base_rates = [group["base_rate"] for group in adamw.param_groups]
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=adamw,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only multiplies with it; batches are the loader's
                "gradient_accumulation_steps": num_parts,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )[0]
        self._zero: Any = self._engine.optimizer
        self._base_rates = base_rates

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self._engine.step()  # moves DeepSpeed to the next part; updates nothing before the last

    def gradient_norm(self) -> Tensor:
        """DeepSpeed reports a norm that is not finite as -1."""
        norm = torch.as_tensor(self._zero.scaled_global_norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.full_like(norm, float("nan")), norm)

    def step(self, rate_share: float, max_norm: float, norm: float) -> None:
        self._zero.clip_grad = max_norm
        for group, rate in zip(self._zero.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * rate_share
        self._engine.step()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder / _TAG), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """DeepSpeed unpickles: the loop verifies the folder's manifest first, and it is the run's own."""
        path, _ = self._engine.load_checkpoint(str(folder / _TAG), tag=_TAG)
        if path is None:
            raise ValueError(f"{folder}: holds no ZeRO state; it is a checkpoint of a run with another engine")


def _start_group(backend: str) -> None:
    """A process group of one on the loopback interface, unless a launcher has made one."""
    if torch.distributed.is_initialized():
        return
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    import deepspeed

    # Its shared-memory reduction is compiled on first use (35 s, and a compiler); one process reduces nothing.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
