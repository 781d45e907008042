"""A checkpoint folder small enough to answer with in a test, and images for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from miss.engine.data.processor import build_tokenizer
from miss.models.config import GenerationConfig, MissConfig, PreprocessConfig, TextConfig, TokenConfig, VisionConfig
from miss.models.vqa import MissVQA
from miss.models.weights import save_checkpoint


def write_checkpoint(folder: Path, vocabulary: Path, seed: int = 3) -> Path:
    """Random weights over the tiny vocabulary, far enough from uniform that answers differ."""
    tokenizer = build_tokenizer(vocabulary)
    text = TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        max_positions=48,
        source_width=32,
    )
    ids = {n: tokenizer.token_to_id(f"[{n.upper()}]") for n in ("pad", "cls", "sep", "dec", "enc")}
    config = MissConfig(
        vision=VisionConfig(
            image_size=28, patch_size=14, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48
        ),
        encoder=text,
        decoder=text,
        preprocess=PreprocessConfig(image_size=28, resample="bicubic", rescale_factor=1 / 64),
        tokens=TokenConfig(**ids),
        generation=GenerationConfig(max_new_tokens=6),
        tie_embeddings=True,
        max_question_length=12,
        name="tiny",
    )
    torch.manual_seed(seed)
    model = MissVQA(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.1))
    save_checkpoint(model, folder, tokenizer=tokenizer)
    return folder


def write_images(folder: Path, count: int = 3) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [folder / f"image{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return paths
