"""Pixels to patch tokens in Triton: bytes are normalised in registers on their way into the product.

Forward: a program a tile of y (BM patches, BN columns); its loop loads BK values of each patch as they lie in the
image, normalises them in float32, rounds them to the weight's dtype and multiplies: no patch rows in memory. A patch's
values are taken in the image's order (line, pixel, channel), 3 P of them in one piece, so that a thread loads 16 bytes
at once; the weight is put in that order first, a copy of C K elements. Backward: dweight's tiles go over the patches in
SPLITS interleaved parts, summed in their order by a second kernel (dbias with them); dpixels is dy @ W, scaled and
stored in place. No atomics. Tiles depend on dtype and patch alone: an image's bits do not depend on its batch.

FLOPs 2 M K C forward, as much for each of dweight and dpixels. Knows where a patch lies; does not know resizing.

Shapes: B batch, N patches an image, M = B N, C width, P patch size, K = 3 P P, SPAN = 3 P.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dense_rows, dot, linear_tile, sum_parts, tile_corner

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "forward": (
        Launch({"BM": 128, "BN": 128, "BK": 32, "GROUP": 8}, 8, 4),
        Launch({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3),
        Launch({"BM": 64, "BN": 128, "BK": 32, "GROUP": 8}, 4, 4),
    ),
    "forward-odd": (Launch({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
    "forward-float32": (Launch({"BM": 32, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
    # SPLITS: 36 tiles of 768 x 768 times 7 are 252 programs, a little under two rounds of an H200's 132 multiprocessors
    "weight": (
        Launch({"BC": 128, "BK": 128, "BM": 64, "SPLITS": 7}, 8, 3),
        Launch({"BC": 128, "BK": 128, "BM": 32, "SPLITS": 7}, 8, 4),
    ),
    "weight-odd": (Launch({"BC": 64, "BK": 64, "BM": 32, "SPLITS": 7}, 4, 2),),
    "weight-float32": (Launch({"BC": 32, "BK": 32, "BM": 32, "SPLITS": 7}, 4, 2),),
    "pixels": (Launch({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3),),
    "pixels-odd": (Launch({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
    "pixels-float32": (Launch({"BM": 32, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2),),
    "sum": (Launch({"BP": 8, "BC": 256}, 4),),
}


@triton.jit
def _corners(row, N, across, image_stride, line_stride, SPAN: tl.constexpr):
    """Where patches begin, int64, counted in elements from the first image's first."""
    patch = row % N
    line = (row // N).to(tl.int64) * image_stride + (patch // across * (SPAN // 3)).to(tl.int64) * line_stride
    return line + patch % across * SPAN


@triton.jit
def _rows(pixels, scale, shift, corner, k, inside, line_stride, SPAN: tl.constexpr, MASKED: tl.constexpr):
    """Normalised values (patches, k) in float32; `inside` (a mask of that shape) is read where MASKED."""
    at = pixels + corner[:, None] + (k // SPAN * line_stride + k % SPAN)[None, :]
    values = tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)
    return values.to(tl.float32) * tl.load(scale + k % 3)[None, :] + tl.load(shift + k % 3)[None, :]


@triton.jit
def _forward(
    pixels, w, bias, scale, shift, y, M, C, K, N, across, image_stride, line_stride,
    EVEN: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """w (C, K) in the image's order of values. EVEN: K is a multiple of BK."""
    top, left = tile_corner(M, C, BM, BN, GROUP)
    row = top + tl.arange(0, BM)
    column = left + tl.arange(0, BN)
    corner = _corners(tl.minimum(row, M - 1), N, across, image_stride, line_stride, SPAN)
    w_at = w + tl.minimum(column, C - 1)[None, :].to(tl.int64) * K + tl.arange(0, BK)[:, None]
    z = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (k < K)[None, :] & (row >= 0)[:, None]
        a = _rows(pixels, scale, shift, corner, k, inside, line_stride, SPAN, EVEN == 0)
        b = tl.load(w_at) if EVEN else tl.load(w_at, mask=(k < K)[:, None], other=0.0)
        z = dot(a.to(w.dtype.element_ty), b, z)
        w_at += BK
    z += tl.load(bias + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    at = y + top.to(tl.int64) * C + left  # and 32 bits within the tile: half the registers of 64
    at += tl.arange(0, BM)[:, None] * C + tl.arange(0, BN)[None, :]
    tl.store(at, z.to(y.dtype.element_ty), mask=(row < M)[:, None] & (column < C)[None, :])


@triton.jit
def _weight(
    dy, pixels, scale, shift, dweight, dbias, M, C, K, N, across, dy_stride, image_stride, line_stride,
    SPAN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """dweight (SPLITS, C, K) in the image's order and dbias (SPLITS, C), parts in float32."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    split = tl.program_id(2)
    total = tl.zeros((BC, BK), tl.float32)
    sums = tl.zeros((BC,), tl.float32)
    for start in range(split * BM, M, SPLITS * BM):
        row = start + tl.arange(0, BM)
        g_at = dy + row[None, :].to(tl.int64) * dy_stride + c[:, None]
        g = tl.load(g_at, mask=(row < M)[None, :] & (c < C)[:, None], other=0.0)
        corner = _corners(tl.minimum(row, M - 1), N, across, image_stride, line_stride, SPAN)
        inside = (k < K)[None, :] & (row < M)[:, None]
        values = _rows(pixels, scale, shift, corner, k, inside, line_stride, SPAN, True)
        total = dot(g, values.to(g.dtype), total)
        sums += tl.sum(g.to(tl.float32), 1)
    at = dweight + (split.to(tl.int64) * C + c[:, None]) * K + k[None, :]
    tl.store(at, total, mask=(c < C)[:, None] & (k < K)[None, :])
    if tl.program_id(1) == 0:
        tl.store(dbias + split * C + c, sums, mask=c < C)


@triton.jit
def _pixels(
    dy, w, scale, dpixels, M, K, C, dy_stride, N, across, image_stride, line_stride,
    EVEN: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """w (K, C), K in the image's order."""
    z, top, left = linear_tile(dy, w, M, K, C, dy_stride, C, EVEN, BM, BN, BK, GROUP)
    row = top + tl.arange(0, BM)
    k = left + tl.arange(0, BN)
    corner = _corners(row, N, across, image_stride, line_stride, SPAN)
    at = dpixels + corner[:, None] + (k // SPAN * line_stride + k % SPAN)[None, :]
    z *= tl.load(scale + k % 3)[None, :]
    tl.store(at, z.to(dpixels.dtype.element_ty), mask=(row < M)[:, None] & (k < K)[None, :])


def _launch(part: str, weight: Tensor) -> tuple[Launch, dict[str, int]]:
    """Patches off 16 pixels have no pieces of 16 bytes: their loads take registers that large tiles do not have."""
    kind = "float32" if weight.dtype == torch.float32 else "odd" if weight.shape[-1] % 16 else ""
    name = f"{part}-{kind}" if kind and part != "sum" else part
    launch = choose("patch_embed", name, {k: v[0] for k, v in LAUNCHES.items()}, weight, *weight.shape)
    return launch, {**launch.blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _dense_lines(pixels: Tensor) -> Tensor:
    """Pixels whose lines (width, 3) are dense; images and lines may lie at any distance."""
    return pixels if pixels.stride()[2:] == (3, 1) else pixels.contiguous()


def _affine(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return scale.float().contiguous(), shift.float().contiguous()


def _geometry(pixels: Tensor, size: int) -> tuple[int, int, int, int]:
    """Patches an image, patches a line of them, and the strides of images and lines."""
    across = pixels.shape[2] // size
    return pixels.shape[1] // size * across, across, pixels.stride(0), pixels.stride(1)


def forward(
    weight: Tensor, bias: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, panels: Tensor | None = None
) -> Tensor:
    width, size = len(weight), weight.shape[-1]
    pixels = _dense_lines(pixels)
    patches, *place = _geometry(pixels, size)
    y = torch.empty(len(pixels), patches, width, dtype=weight.dtype, device=weight.device)
    count, values = len(pixels) * patches, 3 * size * size
    if count:
        launch, options = _launch("forward", weight)
        blocks = launch.blocks
        _forward[(triton.cdiv(count, blocks["BM"]) * triton.cdiv(width, blocks["BN"]),)](
            *(pixels, weight.permute(0, 2, 3, 1).contiguous(), bias.contiguous(), *_affine(scale, shift), y),
            *(count, width, values, patches, *place),
            EVEN=values % blocks["BK"] == 0, SPAN=3 * size, **options,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, weight: Tensor, pixels: Tensor, scale: Tensor, shift: Tensor, need_pixels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dweight, dbias, dpixels), dpixels with no elements unless `need_pixels`."""
    width, size = len(weight), weight.shape[-1]
    gradient, pixels, affine = dense_rows(dy), _dense_lines(pixels), _affine(scale, shift)
    dpixels = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device) if need_pixels else None
    none = pixels.new_empty(0)
    if not len(gradient):
        return torch.zeros_like(weight), weight.new_zeros(width), none if dpixels is None else dpixels
    if dpixels is not None:
        _run_pixels(gradient, weight, affine[0], dpixels)
    dweight, dbias = _run_weight(gradient, weight, pixels, affine)
    dweight = dweight.view(width, size, size, 3).permute(0, 3, 1, 2).contiguous()
    return dweight, dbias, none if dpixels is None else dpixels


def _run_weight(
    gradient: Tensor, weight: Tensor, pixels: Tensor, affine: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(dweight, C K elements in the image's order, dbias)."""
    width, size, count = len(weight), weight.shape[-1], len(gradient)
    values = 3 * size * size
    patches, *place = _geometry(pixels, size)
    launch, options = _launch("weight", weight)
    splits = min(launch.blocks["SPLITS"], triton.cdiv(count, launch.blocks["BM"]))
    parts = torch.empty(splits, width * values, dtype=torch.float32, device=weight.device)
    sums = torch.empty(splits, width, dtype=torch.float32, device=weight.device)
    grid = (triton.cdiv(width, launch.blocks["BC"]), triton.cdiv(values, launch.blocks["BK"]), splits)
    _weight[grid](
        *(gradient, pixels, *affine, parts, sums, count, width, values, patches, place[0], gradient.stride(0)),
        *place[1:], SPAN=3 * size, **options,
    )  # fmt: skip
    launch, options = _launch("sum", weight)
    results = []
    for part in (parts, sums):
        out = torch.empty(part.shape[1], dtype=weight.dtype, device=weight.device)
        blocks = (triton.cdiv(len(out), launch.blocks["BC"]), 1)
        sum_parts[blocks](part, out, out, splits, len(out), OUTPUTS=1, **options)
        results.append(out)
    return results[0], results[1]


def _run_pixels(gradient: Tensor, weight: Tensor, scale: Tensor, dpixels: Tensor) -> None:
    width, size, count = len(weight), weight.shape[-1], len(gradient)
    values = 3 * size * size
    launch, options = _launch("pixels", weight)
    blocks = launch.blocks
    _pixels[(triton.cdiv(count, blocks["BM"]) * triton.cdiv(values, blocks["BN"]),)](
        *(gradient, weight.permute(2, 3, 1, 0).contiguous(), scale, dpixels, count, values, width, gradient.stride(0)),
        *_geometry(dpixels, size), EVEN=width % blocks["BK"] == 0, SPAN=3 * size, **options,
    )  # fmt: skip


_SIZES = {  # runtime arguments that are numbers, in order
    "forward": ("M", "C", "K", "N", "across", "image_stride", "line_stride"),
    "weight": ("M", "C", "K", "N", "across", "dy_stride", "image_stride", "line_stride"),
    "pixels": ("M", "K", "C", "dy_stride", "N", "across", "image_stride", "line_stride"),
}


def _case(kind: str, launch: Launch, source: str, patch: int, default: bool) -> Case:
    part = kind.partition("-")[0]
    t = "*fp32" if kind.endswith("float32") else "*bf16"
    affine = {"scale": "*fp32", "shift": "*fp32"}
    kernel, pointers = {
        "forward": (_forward, {"pixels": source, "w": t, "bias": t, **affine, "y": t}),
        "weight": (_weight, {"dy": t, "pixels": source, **affine, "dweight": "*fp32", "dbias": "*fp32"}),
        "pixels": (_pixels, {"dy": t, "w": t, "scale": "*fp32", "dpixels": source}),
    }[part]
    even = (768 if part == "pixels" else 3 * patch * patch) % launch.blocks["BK"] == 0
    constants = {"SPAN": 3 * patch, **launch.blocks, **({} if part == "weight" else {"EVEN": even})}
    known = {"C", "dy_stride"} | ({"K", "image_stride", "line_stride"} if patch % 16 == 0 else set())
    signature = {**pointers, **dict.fromkeys(_SIZES[part], "i32")}
    name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}-{source.removeprefix('*')}-{patch}"
    ends = tuple(n for n in signature if n in pointers or n in known)
    return Case("patch_embed", name, kernel, signature, constants, launch, default, ends)


def cases() -> Iterator[Case]:
    """From bytes in every launch, patches of 16 x 16 or, for the odd ones, 14 x 14; the defaults from float32, too."""
    for kind, launches in LAUNCHES.items():
        if kind == "sum":
            continue
        size = 14 if kind.endswith("odd") else 16
        for i, launch in enumerate(launches):
            yield _case(kind, launch, "*fp32" if kind.startswith("pixels") else "*u8", size, i == 0)
        if kind in ("forward", "weight"):
            yield _case(kind, launches[0], "*fp32", size, True)
    (launch,) = LAUNCHES["sum"]
    signature = {"partial": "*fp32", "first": "*bf16", "second": "*bf16", "P": "i32", "C": "i32"}
    ends = ("partial", "first", "second", "C")
    yield Case("patch_embed", "sum", sum_parts, signature, {"OUTPUTS": 1, **launch.blocks}, launch, True, ends)
