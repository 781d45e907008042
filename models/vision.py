"""The image encoder: a pre-norm Vision Transformer that returns every token, [CLS] first.

Knows pixels and patches; does not know files, resizing, or what reads the tokens.

Shapes: I images, N patches, C width, P patch size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from miss.kernels.attention import attention, attention_quantised
from miss.kernels.dropout import as_seed, uniform
from miss.kernels.encoder_layer import ImageLayer, image_layer, takes_codes
from miss.kernels.patch_embed import patch_embed
from miss.kernels.quant_linear import QuantRows
from miss.models.config import PreprocessConfig, VisionConfig
from miss.models.layers import LayerNorm, Mlp, SelfAttention, mix, needs_gradient
from miss.models.linear import Panels
from miss.models.recompute import Stack


class PatchEmbed(nn.Module):
    """uint8 pixels to patch tokens: normalise, cut, project. weight (C, 3, P, P), bias (C,)."""

    _panels: Panels | None = None

    def __init__(self, config: VisionConfig, preprocess: PreprocessConfig) -> None:
        super().__init__()
        shape = (config.hidden_size, 3, config.patch_size, config.patch_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self._affine = preprocess.affine
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels uint8 or float (I, height, width, 3), not normalised -> (I, N, C)."""
        scale, shift = self.affine(pixels.device)
        panels = None if self._panels is None else self._panels.of(self.weight)
        return patch_embed(pixels, self.weight, self.bias, scale, shift, panels)

    def prepare(self) -> None:
        """For inference: lays the weight out once instead of at every call."""
        self._panels = Panels(self.weight)

    def affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalisation as fp32 (3,) tensors. Not buffers: `model.to(bfloat16)` would round them by up to 0.4 %."""
        if device not in self._on_device:
            scale, shift = (torch.tensor(values, dtype=torch.float32, device=device) for values in self._affine)
            self._on_device[device] = scale, shift
        return self._on_device[device]


class ImageAttention(SelfAttention):
    """Every token attends to every token of its image; where the layer takes int8 codes, by scores of codes. (Texts do
    not: whether their lengths are given depends on what shares the batch.)"""

    def forward(self, x: Tensor | QuantRows) -> Tensor:  # type: ignore[override]
        """x (I, N, C) -> (I, N, C)."""
        q, k, v = self.project(x)
        out = attention_quantised(q, k, v) if isinstance(x, QuantRows) else attention(q, k, v)
        return self.output(out.flatten(-2))


class VisionBlock(nn.Module):
    """norm, self-attention, add; norm, MLP, add. `drop_path`: the chance that a branch is left out for an image."""

    _whole: ImageLayer | None = None

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = ImageAttention(config.hidden_size, config.num_heads)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def weights(self) -> ImageLayer:
        """What an operation over the whole layer takes."""
        own, mlp = self.attention, self.mlp
        return ImageLayer(
            *(self.norm1.norm(), own.qkv.matrix(), own.output.matrix()),
            *(self.norm2.norm(), mlp.input.matrix(), mlp.output.matrix()),
        )

    def prepare(self) -> None:
        """For inference, after the linear layers were: those that take codes throughout run as one operation."""
        self._whole = weights if takes_codes(weights := self.weights()) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisionBlock":
        super()._apply(fn, recurse)
        if self._whole is not None:
            self.prepare()
        return self

    def forward(self, x: Tensor, seed: int | None = None) -> Tensor:
        """x (I, 1 + N, C) -> the same shape; branches are left out in training alone, and only with a seed."""
        if self._whole is not None and not self._drops(seed) and not needs_gradient(x):
            return image_layer(x, self._whole, self.attention.num_heads)
        attended = self.attention(self.norm1.feed(x, self.attention.qkv))
        if not self._drops(seed):
            h, x = self.norm2.add_feed(attended, x, self.mlp.input)
            return self.mlp(h, residual=x)
        h, x = self.norm2.add(self._branch(attended, mix(seed, 0)), x)
        return x + self._branch(self.mlp(h), mix(seed, 1))

    def first(self, x: Tensor) -> Tensor:
        """What `forward` gives each image's [CLS] alone, without a seed: x (I, 1 + N, C) -> (I, C)."""
        attended = self.attention.first(self.norm1(x))
        h, x = self.norm2.add(attended, x[:, 0])
        return self.mlp(h, residual=x)

    def _drops(self, seed: int | None) -> bool:
        return seed is not None and self.training and self.drop_path > 0

    def _branch(self, x: Tensor, seed: int | None) -> Tensor:
        keep, drawn = 1 - self.drop_path, as_seed(seed, self.drop_path)
        assert drawn is not None
        kept = uniform(drawn, (len(x), *[1] * (x.dim() - 1)), x.device) < keep
        return x * (kept.to(x.dtype) / keep)


class VisionTransformer(Stack):
    """ViT of `VisionConfig`: pixels (I, height, width, 3) -> tokens (I, 1 + N, C)."""

    def __init__(self, config: VisionConfig, preprocess: PreprocessConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, preprocess)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_positions, config.hidden_size))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        rates = torch.linspace(0, config.drop_path, config.num_layers, device="cpu").tolist()  # also under meta
        self.blocks = nn.ModuleList(VisionBlock(config, rate) for rate in rates)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor, seed: int | None = None) -> Tensor:
        """pixels uint8 or float (I, height, width, 3); height and width multiples of the patch size. `seed`: draws, in
        training, the branches that are left out; None leaves none out.

        Raises:
            ValueError: height or width is not a multiple of the patch size.
        """
        x = self._embedded(pixels)
        for i, block in enumerate(self.blocks):
            x = self.through(block, x, mix(seed, i))
        return self.norm(x)

    def first(self, pixels: Tensor) -> Tensor:
        """[CLS] of every image, (I, C): the last block's other rows, which nobody reads, are not computed."""
        x = self._embedded(pixels)
        *before, last = self.blocks
        for block in before:
            x = block(x)
        assert isinstance(last, VisionBlock)
        return self.norm(last.first(x))

    def _embedded(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels)
        patch = self.config.patch_size
        positions = self.positions((pixels.shape[1] // patch, pixels.shape[2] // patch)).to(x.dtype)
        return torch.cat(
            [(self.cls_token.to(x.dtype) + positions[:, :1]).expand(len(x), -1, -1), x + positions[:, 1:]], 1
        )

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1, 1 + N, C) for a grid of (rows, columns) patches."""
        return interpolate_positions(self.position_embedding, grid)


def interpolate_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A learned position table (1, 1 + n*n, C) on another grid of patches, bicubic; [CLS]'s row is kept.

    `align_corners=False`, no antialiasing, as in BLIP (`interpolate_pos_embed`) and DINOv2. In float32 for halves.

    Raises:
        ValueError: the table is not that of a square grid.
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if side * side + 1 != table.shape[1]:
        raise ValueError(f"a position table of {table.shape[1]} rows is not one [CLS] row and a square grid of patches")
    if grid == (side, side):
        return table
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if patches.dtype in (torch.float16, torch.bfloat16):
        patches = patches.float()
    resized = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)
