"""What new requests need before their first token: their images encoded once each, their questions in their slots.

Knows the model, the image cache and slots; does not know who waits, or how answers are chosen.

On CUDA all of it runs on a stream of its own, beside the decoding of those that came before. Where batches are filled
up, images and questions go through programs of few sizes (`graphs`).

Shapes: I images, R questions, T question length.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.engine.runtime.ahead import bucket_of
from miss.engine.runtime.faults import survive
from miss.engine.runtime.graphs import Graphs
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.request import Request, RequestImage
from miss.engine.runtime.slots import Slots
from miss.engine.runtime.stages import stage
from miss.kernels.cross_attention import KV
from miss.models.cross_kv import Shape, new_room, split_layers
from miss.models.vqa import MissVQA

LENGTHS = (8, 16, 24, 32)  # of questions in a program; longer ones get the longest that a slot holds


@dataclass
class _Questions:
    """The fixed tensors of a program: ids int64 (R, T), slots int64 (R,), image_index and lengths int32 (R,)."""

    ids: Tensor
    slots: Tensor
    image_index: Tensor
    lengths: Tensor


class Prefill:
    """`run` puts new requests into their question slots; `wait` lets decoding come after it."""

    def __init__(self, model: MissVQA, slots: Slots, images: ImageCache, graphs: Graphs, fill_up: bool) -> None:
        self.model, self.slots, self.images, self.graphs = model, slots, images, graphs
        self.device = slots.cache.self_k.device
        # The original's answers depend on the padding of their batch: filling one up would change them.
        self.fills_up = fill_up and model.config.behaviour != "compat"
        self.num_encoded = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self._stream is not None:  # after the writing of the weights, the slots and what is given already
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def run(self, requests: Sequence[Request]) -> None:
        """Encodes the requests' images and questions; one that memory does not suffice for fails."""
        order = {id(image): i for i, image in enumerate(dict.fromkeys(r.image for r in requests))}
        with self._beside():
            survive(sorted(requests, key=lambda r: order[id(r.image)]), self._run)
        for request in requests:
            request.image = None

    def wait(self) -> None:
        """What is given to the device from now on comes after what was prefilled."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            yield

    def _run(self, requests: Sequence[Request]) -> list[None]:
        with stage("image", self.device):
            image_kv, places = self._image_kv(list(dict.fromkeys(_image(r) for r in requests)))
            encoded = self._now()
        with stage("question", self.device):
            self._read(requests, image_kv, places)
            prefilled = self._now()
        for request in requests:
            request.encoded, request.prefilled = encoded, prefilled
        return [None] * len(requests)

    def _read(self, requests: Sequence[Request], image_kv: list[KV], places: dict[RequestImage, int]) -> None:
        """Questions over their images, into their slots."""
        rows = sorted(requests, key=lambda r: places[_image(r)])
        longest = max(len(r.question_ids) for r in rows)
        size = len(rows)
        if self.fills_up:
            most = self.slots.cache.cross_k.shape[2]
            longest, size = next((n for n in LENGTHS if longest <= n <= most), most), bucket_of(len(rows))
        more = size - len(rows)
        ids = [r.question_ids + [0] * (longest - len(r.question_ids)) for r in rows]
        index = [places[_image(r)] for r in rows]
        wanted = _Questions(
            torch.tensor(ids + [ids[-1]] * more, device=self.device),
            torch.tensor([r.question_slot for r in rows] + [self.slots.spare_question] * more, device=self.device),
            self._int32(index + index[-1:] * more),
            self._int32([len(r.question_ids) for r in rows] + [len(rows[-1].question_ids)] * more),
        )
        if self.fills_up and self._pooled(image_kv):
            self._replay(wanted, image_kv)
        else:
            self._encode(wanted, image_kv)

    def _encode(self, q: _Questions, image_kv: list[KV]) -> None:
        self.model.encode(image_kv, q.image_index, q.ids, q.lengths, self.slots.cache, q.slots)

    def _replay(self, wanted: _Questions, image_kv: list[KV]) -> None:
        def make() -> tuple[_Questions, Callable[[], None]]:
            fixed = _Questions(*(t.clone() for t in vars(wanted).values()))
            return fixed, lambda: self._encode(fixed, image_kv)

        key = ("question", *wanted.ids.shape, image_kv[0].k.data_ptr())
        fixed, encode = self.graphs.program(key, make)
        for to, value in zip(vars(fixed).values(), vars(wanted).values(), strict=True):
            to.copy_(value)
        encode()

    def _pooled(self, image_kv: list[KV]) -> bool:
        """Whether these are the whole pool's keys and values, which stay where they are."""
        return self.images.has_pool and image_kv[0].k.data_ptr() == split_layers(self.images.pool)[0].k.data_ptr()

    def _image_kv(self, images: list[RequestImage]) -> tuple[list[KV], dict[RequestImage, int]]:
        """Keys and values of every layer, and where in them each image is: in the cache's pool where all have a place
        in it, else in a tensor of this batch alone."""
        slots = self.images.kv_slots([image.key for image in images])
        missing = [image for image, slot in zip(images, slots, strict=True) if slot is None]
        if missing:
            tokens, in_use = self._tokens(missing), {slot for slot in slots if slot is not None}
            shape = self.model.encoder.cross_kv.shape
            with self.images.reserved([image.key for image in missing], tokens, shape, in_use) as placed:
                if None in placed:
                    kept = [(i, s) for i, s in zip(images, slots, strict=True) if s is not None]
                    return self._apart(tokens, shape, missing, kept, placed)
                self._project(tokens, [slot for slot in placed if slot is not None])
            new = iter(placed)
            slots = [next(new) if slot is None else slot for slot in slots]
        found = {image: slot for image, slot in zip(images, slots, strict=True) if slot is not None}
        if self.fills_up:  # a program reads the same memory each time
            return split_layers(self.images.pool), found
        layers, first = self.images.layers(list(found.values()))
        return layers, {image: slot - first for image, slot in found.items()}

    def _project(self, tokens: Tensor, slots: list[int]) -> None:
        """Keys and values of tokens (I, N, C) into their slots of the pool, in place."""
        pool, first = self.images.pool, slots[0]
        if slots == list(range(first, first + len(slots))):
            self.model.project_images(tokens, pool[first : first + len(slots)])
            return
        for i, slot in enumerate(slots):
            self.model.project_images(tokens[i : i + 1], pool[slot : slot + 1])

    def _apart(
        self,
        tokens: Tensor,
        shape: Shape,
        missing: list[RequestImage],
        kept: list[tuple[RequestImage, int]],
        placed: list[int | None],
    ) -> tuple[list[KV], dict[RequestImage, int]]:
        """What `_image_kv` gives where the pool is too small for the batch: a tensor of this batch alone."""
        together = new_room(tokens, len(missing) + len(kept), tokens.shape[1], shape)
        self.model.project_images(tokens, together[: len(missing)])
        for row, (_, slot) in enumerate(kept, len(missing)):
            together[row].copy_(self.images.pool[slot])
        for row, place in enumerate(placed):
            if place is not None:
                self.images.pool[place].copy_(together[row])
        return split_layers(together), {image: i for i, image in enumerate([*missing, *(i for i, _ in kept)])}

    def _tokens(self, images: list[RequestImage]) -> Tensor:
        """The images' tokens (I, N, C), those that have none yet encoded in one batch."""
        new = [image for image in images if image.tokens is None]
        if new:
            encoded = self._encoded(torch.stack([torch.from_numpy(image.pixels) for image in new]))
            self.num_encoded += len(new)
            for i, image in enumerate(new):
                # A row of a batch, or of a program's tensor, would hold all of it in memory.
                alone = len(new) == 1 and not self.fills_up
                image.tokens, image.pixels = encoded[i] if alone else encoded[i].clone(), None
                self.images.keep_tokens(image.key, image.tokens)
            if len(new) == len(images):
                return encoded
        return torch.stack([image.tokens for image in images if image.tokens is not None])

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Tokens (I, N, C) of pixels uint8 (I, S, S, 3) on the host; with programs, until the next call."""
        if not self.fills_up:
            return self.model.encode_images(pixels.to(self.device))

        def make() -> tuple[list[Tensor], Callable[[], None]]:
            shown = pixels.to(self.device)
            tokens = torch.empty_like(self.model.encode_images(shown))

            def encode() -> None:
                tokens.copy_(self.model.encode_images(shown))

            return [shown, tokens], encode

        (shown, tokens), encode = self.graphs.program(("image", len(pixels)), make)
        shown.copy_(pixels)
        encode()
        return tokens

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _now(self) -> float:
        """The time once the device has done what it was given, so that a stage's time is its own."""
        if self._stream is not None:
            self._stream.synchronize()
        return time.monotonic()


def _image(request: Request) -> RequestImage:
    assert request.image is not None
    return request.image
