"""The model card that a checkpoint folder carries where nobody wrote a better one.

Knows a configuration; does not know figures, data or training: a card with those is written by who measured them.
"""

from miss.models.config import MissConfig

INTENDED_USE = "Research only. Not for diagnosis, treatment or any other clinical use."


def default_card(config: MissConfig, origin: str = "") -> str:
    """Markdown: what the model is, what it is for, and what is not known about it."""
    vision, encoder, decoder = config.vision, config.encoder, config.decoder
    return f"""---
library_name: miss-engine
pipeline_tag: visual-question-answering
---
# {config.name}

A generative model that answers questions about medical images (MISS, arXiv 2401.05163).

**Intended use.** {INTENDED_USE}

| part | form |
|---|---|
| image encoder | ViT, {vision.num_layers} layers, {vision.hidden_size} wide, {vision.patch_size} px patches |
| joint encoder | BERT, {encoder.num_layers} layers, {encoder.hidden_size} wide |
| answer decoder | BERT, {decoder.num_layers} layers, {decoder.hidden_size} wide |
| preprocessing | {config.preprocess.image_size} px, {config.preprocess.resample} |
| behaviour | {config.behaviour} |

{origin or "Origin, training data and figures are not recorded here."}
"""
