"""Hugging Face's BlipForQuestionAnswering as shipped, with the vision attention replaced by SDPA, and compiled.

Knows transformers and torch's compiler and dynamic quantisation; does not know other peers.
`hf-fp32`, `hf-bf16` (eager), `hf-sdpa-fp32`, `hf-sdpa-bf16`, `hf-compiled-fp32`, `hf-compiled-bf16`, `torch-int8`.

Its decoder keeps keys and values in its own cache, through its own `generate`. `compiled` are the image and the
question encoder, with SDPA, frozen, or on a GPU captured as graphs; the decoder stays eager (its compilation did not
end within minutes). On a GPU none of it was ever run.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miss.benchmarks.peers.job import Job, Output, likeliest
from miss.models.config import MissConfig
from miss.models.files import atomic_folder
from miss.models.hugging_face import hf_files, to_hf
from miss.models.tensor_file import write_tensors
from miss.models.weights import read_checkpoint, read_config


def convert(variant: str, checkpoint: Path, work: Path, calibration: list[Path]) -> None:
    """A Hugging Face folder of the same tensors."""
    import json

    folder = work / "hf"
    if folder.is_dir():
        return
    config, tensors = read_checkpoint(checkpoint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        write_tensors(to_hf(config, tensors), temporary / "model.safetensors", {"format": "pt"})
        for name, values in hf_files(config).items():
            (temporary / name).write_text(json.dumps(values), encoding="utf-8")


def load(variant: str, checkpoint: Path, work: Path, threads: int, dynamic: bool, device: str = "cpu") -> "HuggingFace":
    import transformers

    transformers.logging.set_verbosity_error()
    config, _ = read_config(checkpoint)
    dtype = torch.bfloat16 if variant.endswith("bf16") else torch.float32
    model: Any = transformers.BlipForQuestionAnswering.from_pretrained(work / "hf", dtype=dtype, local_files_only=True)
    model = model.eval().to(device)
    if variant.startswith(("sdpa", "compiled")):
        _use_sdpa(model)
    if variant == "int8":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return HuggingFace(model, config, dtype, variant.startswith("compiled"))


def _use_sdpa(model: Any) -> None:
    """Its vision attention as one F.scaled_dot_product_attention, which the class does not offer."""

    def forward(self: Any, hidden_states: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.projection(out.transpose(1, 2).flatten(2)), None

    for layer in model.vision_model.encoder.layers:
        layer.self_attn.forward = forward.__get__(layer.self_attn)


class HuggingFace:
    def __init__(self, model: Any, config: MissConfig, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        scale, shift = config.preprocess.affine
        self._device = next(model.parameters()).device
        self._scale, self._shift = (torch.tensor(value, device=self._device) for value in (scale, shift))
        self._vision: Callable[..., Any] = model.vision_model
        self._encoder: Callable[..., Any] = model.text_encoder
        if compiled:
            import torch._inductor.config as inductor

            inductor.freezing = self._device.type == "cpu"
            mode = None if inductor.freezing else "reduce-overhead"  # captured graphs, on a GPU
            self._vision, self._encoder = (torch.compile(f, mode=mode) for f in (self._vision, self._encoder))

    def prepare(self, job: Job) -> None:
        pass

    @torch.no_grad()
    def run(self, job: Job) -> Output:
        start = self._now()
        images = self._images(job)
        seen = self._now()
        states = self._states(job, images)
        read = self._now()
        tokens = self._answers(states, job.num_tokens)
        end = time.perf_counter()
        return Output(tokens, {"image": seen - start, "question": read - seen, "decode": end - read})

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @torch.no_grad()
    def first(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        states = self._states(job, self._images(job))
        out = self.model.text_decoder(
            input_ids=self._full(len(states), 1, value=self.config.tokens.dec),
            encoder_hidden_states=states,
            encoder_attention_mask=self._full(*states.shape[:2]),
        )
        return likeliest(out.logits[:, -1].float().cpu().numpy())

    def _full(self, *shape: int, value: int = 1) -> Tensor:
        return torch.full(shape, value, device=self._device)

    def _images(self, job: Job) -> Tensor:
        pixels = (torch.from_numpy(job.pixels).to(self._device).float() * self._scale + self._shift).permute(0, 3, 1, 2)
        return self._vision(pixel_values=pixels.to(self.dtype))[0]

    def _states(self, job: Job, images: Tensor) -> Tensor:
        """Every question with its image's tokens: copied, as the class has no other way."""
        if job.questions_per_image > 1:
            images = images.repeat_interleave(job.questions_per_image, 0)
        ids = torch.from_numpy(job.ids).to(self._device)
        return self._encoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=images,
            encoder_attention_mask=self._full(*images.shape[:2]),
            return_dict=False,
        )[0]

    def _answers(self, states: Tensor, num_tokens: int) -> list[list[int]]:
        tokens = self.config.tokens
        found = self.model.text_decoder.generate(
            input_ids=self._full(len(states), 1, value=tokens.dec),
            eos_token_id=tokens.sep,
            pad_token_id=tokens.pad,
            encoder_hidden_states=states,
            encoder_attention_mask=self._full(*states.shape[:2]),
            max_new_tokens=num_tokens,
            do_sample=False,
            num_beams=1,
        )
        rows = [row[1:] for row in found.tolist()]
        return [row[: row.index(tokens.sep) + 1] if tokens.sep in row else row for row in rows]
