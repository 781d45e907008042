"""Raw pixels to patch tokens."""

from collections.abc import Iterator

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import IMAGES, Shapes
from miss.kernels.patch_embed import patch_embed


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    vision = shapes.preset.vision
    for dtype in dtypes:
        for images in (1, IMAGES):
            yield _case(images, shapes.image_size, vision.patch_size, vision.hidden_size, dtype)


def _case(images: int, size: int, patch: int, width: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (images, size, size, 3)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=generator.device)
        kernel = normal(generator, width, 3, patch, patch, dtype=dtype, size=0.04)
        scale = torch.tensor([0.0171, 0.0175, 0.0174], device=generator.device)
        shift = torch.tensor([-2.118, -2.036, -1.804], device=generator.device)
        return pixels, kernel, normal(generator, width, dtype=dtype, size=0.1), scale, shift

    tokens, columns = images * (size // patch) ** 2, 3 * patch * patch
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return Case(
        "patch_embed", f"B={images} {size} px P={patch} C={width}", str(dtype).removeprefix("torch."),
        make, patch_embed, 2.0 * tokens * columns * width,
        reads=images * size * size * 3 + width * columns * dtype.itemsize,
        writes=tokens * width * dtype.itemsize, kind=kind, tolerance=3e-2 if dtype != torch.float32 else 2e-5,
    )  # fmt: skip
