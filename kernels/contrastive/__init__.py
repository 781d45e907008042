"""Image-text contrast against the batch and a queue, with soft targets; hard negatives drawn on the device."""

from miss.kernels.contrastive.op import contrastive_loss, hard_negatives

__all__ = ["contrastive_loss", "hard_negatives"]
