"""Where the model looked for each token of an answer, as maps over the image, and a picture of them.

Knows the processor's texts and the model's probabilities; does not know requests, caches or files of images.

The decoder reads the image only through the question: a token's map is what its query reads of the question's states,
times what these read of the image's tokens. Both are means over heads and over the last half of the tower's layers,
where text has met image. It is where attention went, not a proof of what the answer rests on.

Shapes: A answer tokens, T question tokens, N image tokens, [CLS] first and then (height, width) patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miss.engine.data.processor import Processor
from miss.models.looking import look
from miss.models.vqa import MissVQA

NOTICE = "research only, not for diagnosis"
_COLUMNS = 4  # of the picture, the image itself included


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """tokens: the answer's, as text, the closing [SEP] as "(end)". question_tokens: the question's.

    maps: float32 (A, height, width), each patch's share of the token's attention; `elsewhere` float32 (A,) is the rest,
    which went to [CLS]: together they sum to 1. of_question: float32 (A, T), rows sum to 1.
    """

    tokens: list[str]
    question_tokens: list[str]
    maps: np.ndarray
    elsewhere: np.ndarray
    of_question: np.ndarray


def last_half(num_layers: int) -> list[int]:
    """The layers that are looked at."""
    return list(range(num_layers // 2, num_layers))


@torch.inference_mode()
def attention_maps(
    model: MissVQA, processor: Processor, pixels: np.ndarray, question_ids: Sequence[int], token_ids: Sequence[int]
) -> AttentionMaps:
    """Maps of an answer that the model gave.

    Args:
        pixels: uint8 (S, S, 3), as `Processor.image` gives it.
        question_ids: [ENC] … [SEP]. token_ids: the answer's, without [DEC].

    Raises:
        ValueError: the answer has no tokens.
    """
    if not token_ids:
        raise ValueError("an answer without tokens looked at nothing; wanted at least one token")
    device, config = next(model.parameters()).device, model.config
    image = torch.from_numpy(pixels).to(device)[None]
    question = torch.tensor([list(question_ids)], device=device)
    fed = torch.tensor([[config.tokens.dec, *token_ids[:-1]]], device=device)
    image_kv = model.project_images(model.encode_images(image))
    states, of_image = look(model.encoder, question, image_kv, last_half(config.encoder.num_layers))
    _, of_question = look(model.decoder, fed, model.project_questions(states), last_half(config.decoder.num_layers))
    seen = (of_question @ of_image).float().cpu().numpy()
    side = round((seen.shape[1] - 1) ** 0.5)
    assert side * side == seen.shape[1] - 1, "the image's patches are not a square"
    return AttentionMaps(
        [_text(processor, t) for t in token_ids],
        [_text(processor, t) for t in question_ids],
        seen[:, 1:].reshape(-1, side, side),
        seen[:, 0],
        of_question.float().cpu().numpy(),
    )


def _text(processor: Processor, token: int) -> str:
    if token == processor.sep:
        return "(end)"
    return processor.tokenizer.id_to_token(token) or f"#{token}"


def draw(maps: AttentionMaps, image: np.ndarray, path: Path, question: str, answer: str) -> None:
    """Writes a PNG: the image, and over it a map for each token of the answer, all on one scale of colour.

    Args:
        image: uint8 (H, W, 3), as it was decoded: the square that the model saw is stretched back to its shape.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    Figure = _figure()
    columns = min(_COLUMNS, 1 + len(maps.tokens))
    rows = -(-(1 + len(maps.tokens)) // columns)
    height = 3.0 * min(max(image.shape[0] / image.shape[1], 0.4), 2.5)
    figure = Figure(figsize=(3.0 * columns + 0.9, (height + 0.4) * rows + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    extent = (0, image.shape[1], image.shape[0], 0)
    panels[0].imshow(image, extent=extent)
    panels[0].set_title("image")
    most = float(maps.maps.max()) * 100
    for panel, token, seen in zip(panels[1:], maps.tokens, maps.maps, strict=False):
        panel.imshow(image, extent=extent)
        alpha = 0.75 * seen * 100 / most  # what is hardly looked at stays visible as it is
        shown = panel.imshow(
            seen * 100, cmap="inferno", alpha=alpha, vmin=0, vmax=most, extent=extent, interpolation="bilinear"
        )
        panel.set_title(_plain(token))
    figure.colorbar(shown, ax=panels.tolist(), label="% of attention, a patch", shrink=0.8)
    figure.suptitle(_plain(f"{_short(question)}  {_short(answer) or '(nothing)'}"))
    figure.supxlabel(f"where the model looked, by answer token; {NOTICE}", fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot: no windows, no state of the process
    except ModuleNotFoundError as error:
        raise ValueError(
            'drawing an attention map needs matplotlib, which is not installed: pip install "miss-engine[evaluate]"'
        ) from error
    return Figure


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"


def _plain(text: str) -> str:
    """`$` begins a formula in matplotlib."""
    return text.replace("$", r"\$")
