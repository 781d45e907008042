"""The model in four plain PyTorch graphs with caches as inputs and outputs, for whoever takes ONNX.

Knows a checkpoint's tensors and the function they make; does not know ONNX Runtime or OpenVINO, or what either likes.
The graphs are written out here and not taken from `models/`: a peer that ran on our own code would be no peer.

  vision    pixels uint8 (I, S, S, 3) -> image tokens (I, N, C)
  question  image tokens (I, N, C), ids int64 (I, Q, T), mask (I, Q, T) -> states (I * Q, T, C)
  cross     states (R, T, C) -> keys and values of every decoder layer, 2 * layers of (R, H, T, D)
  step      token int64 (R,), position int64 (1,), self mask (A + 1,), cross mask (R, T), those keys and values, and
            2 * layers of (R, H, A, D) that earlier steps made -> token int64 (R,), logits (R, V), 2 * layers of new
            keys and values (R, H, 1, D)

Masks are float32, 0 where a key counts and -1e9 where not. A step always reads all A places, of which the mask hides
those that are not written yet: shapes stay static, which both runtimes are faster with.
Shapes: I images, Q questions an image, R = I * Q rows, T question length, A answer length, H heads, D head width.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miss.models.config import MissConfig

HIDDEN = -1e9  # of a mask


def _parts(config: MissConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Products that stand as one in a checkpoint, apart: exported, the cutting of a constant is not folded."""
    head, _, kind = name.rpartition(".")
    depth = {"encoder.cross_kv": config.encoder.num_layers, "decoder.cross_kv": config.decoder.num_layers}.get(head)
    count = 3 if head.endswith(".qkv") else 2 * depth if depth else 0
    if not count:
        yield name, tensor
    for i, part in enumerate(tensor.chunk(count) if count else ()):
        yield f"{head}.{i}.{kind}", part.clone()


class Graph(nn.Module):
    """Tensors of a checkpoint by name, and the layers that all four graphs are made of."""

    def __init__(self, config: MissConfig, tensors: Mapping[str, Tensor], heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.heads, self.dtype = config, heads, dtype
        self._tensors = {name: part for n, t in tensors.items() for name, part in _parts(config, n, t.to(dtype))}
        if config.tie_embeddings:
            tied = {n: t for n, t in self._tensors.items() if n.startswith("encoder.embeddings.")}
            self._tensors |= {f"decoder.{n.removeprefix('encoder.')}": t for n, t in tied.items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], eps)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.input")), f"{name}.output")

    def split(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def qkv(self, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(self.linear(x, f"{name}.qkv.{part}")) for part in range(3))
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, D) over (B, H, N, D) -> (B, T, C): matmul, softmax, matmul, which the runtimes look for."""
        scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5)
        scores = scores if mask is None else scores + mask
        return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).flatten(2)

    def source(self, x: Tensor, tower: str, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer's cross-attention."""
        k, v = (self.split(self.linear(x, f"{tower}.cross_kv.{2 * layer + part}")) for part in range(2))
        return k, v

    def embed(self, ids: Tensor, where: Tensor, tower: str, eps: float) -> Tensor:
        name = f"{tower}.embeddings"
        x = F.embedding(ids, self._tensors[f"{name}.word.weight"]) + F.embedding(
            where, self._tensors[f"{name}.position.weight"]
        )
        return self.norm(x, f"{name}.norm", eps)


class Vision(Graph):
    def __init__(self, config: MissConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, tensors, config.vision.num_heads, dtype)
        scale, shift = config.preprocess.affine
        self.scale, self.shift = torch.tensor(scale, dtype=dtype), torch.tensor(shift, dtype=dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        config, eps = self.config.vision, self.config.vision.layer_norm_eps
        x = (pixels.to(self.dtype) * self.scale + self.shift).permute(0, 3, 1, 2)
        name = "vision.patch_embed"
        x = F.conv2d(x, self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"], stride=config.patch_size)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self._tensors["vision.cls_token"].expand(x.shape[0], -1, -1), x], 1)
        x = x + self._tensors["vision.position_embedding"]
        for i in range(config.num_layers):
            block = f"vision.blocks.{i}"
            q, k, v = self.qkv(self.norm(x, f"{block}.norm1", eps), f"{block}.attention")
            x = x + self.linear(self.attend(q, k, v, None), f"{block}.attention.output")
            x = x + self.mlp(self.norm(x, f"{block}.norm2", eps), f"{block}.mlp")
        return self.norm(x, "vision.norm", eps)


class Question(Graph):
    def __init__(self, config: MissConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, tensors, config.encoder.num_heads, dtype)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        config, eps = self.config.encoder, self.config.encoder.layer_norm_eps
        images, questions, length = ids.shape
        shown = mask.reshape(images * questions, 1, 1, length)
        x = self.embed(ids.reshape(images * questions, length), torch.arange(length), "encoder", eps)
        for i in range(config.num_layers):
            layer = f"encoder.layers.{i}"
            read = self.linear(
                self.attend(*self.qkv(x, f"{layer}.self_attention"), shown), f"{layer}.self_attention.output"
            )
            x = self.norm(x + read, f"{layer}.self_attention.norm", eps)
            cross = f"{layer}.cross_attention"
            # All questions of an image in one product over its keys, which are computed once.
            q = self.split(self.linear(x, f"{cross}.query").reshape(images, questions * length, config.hidden_size))
            read = self.attend(q, *self.source(image, "encoder", i), None)
            read = self.linear(read.reshape(images * questions, length, config.hidden_size), f"{cross}.output")
            x = self.norm(x + read, f"{cross}.norm", eps)
            x = self.norm(x + self.mlp(x, f"{layer}.mlp"), f"{layer}.mlp.norm", eps)
        return x


class Cross(Graph):
    def __init__(self, config: MissConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, tensors, config.decoder.num_heads, dtype)

    def forward(self, states: Tensor) -> list[Tensor]:
        layers = range(self.config.decoder.num_layers)
        return [tensor for i in layers for tensor in self.source(states, "decoder", i)]


class Step(Graph):
    def __init__(self, config: MissConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, tensors, config.decoder.num_heads, dtype)

    def forward(
        self,
        token: Tensor,
        position: Tensor,
        self_mask: Tensor,
        cross_mask: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        config, eps = self.config.decoder, self.config.decoder.layer_norm_eps
        x = self.embed(token[:, None], position, "decoder", eps)
        new: list[Tensor] = []
        for i in range(config.num_layers):
            layer = f"decoder.layers.{i}"
            q, k, v = self.qkv(x, f"{layer}.self_attention")
            new += [k, v]
            k, v = (torch.cat([a, b], 2) for a, b in zip(past[2 * i : 2 * i + 2], (k, v), strict=True))
            read = self.linear(self.attend(q, k, v, self_mask), f"{layer}.self_attention.output")
            x = self.norm(x + read, f"{layer}.self_attention.norm", eps)
            q = self.split(self.linear(x, f"{layer}.cross_attention.query"))
            read = self.attend(q, cross[2 * i], cross[2 * i + 1], cross_mask[:, None, None])
            x = self.norm(
                x + self.linear(read, f"{layer}.cross_attention.output"), f"{layer}.cross_attention.norm", eps
            )
            x = self.norm(x + self.mlp(x, f"{layer}.mlp"), f"{layer}.mlp.norm", eps)
        x = self.norm(F.gelu(self.linear(x, "decoder.head.transform")), "decoder.head.norm", eps)
        # Over three dimensions: of two, the product is exported as Gemm, which ONNX Runtime does not quantise.
        logits = F.linear(x, self._tensors["decoder.embeddings.word.weight"], self._tensors["decoder.head.bias"])[:, 0]
        return logits.argmax(-1), logits, new


GRAPHS: dict[str, Any] = {"vision": Vision, "question": Question, "cross": Cross, "step": Step}
