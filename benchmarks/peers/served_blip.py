"""Hugging Face's BlipForQuestionAnswering as a server of it calls it: images' bytes and questions in, answers out.

Knows transformers' class and the checkpoint's processor; does not know HTTP or batching. One call is one batch: every
question has its image's pixels, encoded with it, as the class has no other way.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from miss.benchmarks.peers import hugging_face
from miss.engine.data.processor import Processor

Asked = tuple[np.ndarray, list[int]]


class ServedBlip:
    """`read`, then `answer`."""

    def __init__(self, checkpoint: Path, work: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        found = hugging_face.load("fp32", checkpoint, work, threads, True)
        self.model, self.tokens = found.model, found.config.tokens
        self.max_new_tokens = found.config.generation.max_new_tokens
        self.processor = Processor.from_folder(checkpoint)
        self._scale, self._shift = (torch.tensor(value) for value in found.config.preprocess.affine)

    def read(self, image: bytes, question: str) -> Asked:
        """(pixels uint8 (S, S, 3), token ids)."""
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        return self.processor.image(pixels), self.processor.question(question)

    @torch.no_grad()
    def answer(self, asked: list[Asked]) -> list[str]:
        """Greedy, all as one batch; shorter questions are padded and masked."""
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in asked])).float() * self._scale + self._shift
        images = self.model.vision_model(pixel_values=pixels.permute(0, 3, 1, 2))[0]
        length = max(len(ids) for _, ids in asked)
        ids = torch.tensor([[*ids, *[self.tokens.pad] * (length - len(ids))] for _, ids in asked])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for _, ids in asked])
        states = self.model.text_encoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long),
            return_dict=False,
        )[0]
        return self._texts(states, mask)

    def _texts(self, states: torch.Tensor, mask: torch.Tensor) -> list[str]:
        rows: Any = self.model.text_decoder.generate(
            input_ids=torch.full((len(states), 1), self.tokens.dec),
            eos_token_id=self.tokens.sep,
            pad_token_id=self.tokens.pad,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [self.processor.decode(row[1:]) for row in rows.tolist()]
