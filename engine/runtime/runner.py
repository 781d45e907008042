"""The model's work for a batch of requests: their images and questions once, then a token a branch and step.

Knows the model, the cache's slots and what searches ask; does not know who waits, how a token is chosen, or text.

Shapes: I images, R rows (a question in prefill; a token in decode), T question length, V vocabulary.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from miss.engine.runtime.faults import survive
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.ranker import Ranking, rank_questions
from miss.engine.runtime.request import Request, RequestImage
from miss.engine.runtime.rows import Asked, RowTensors, answer_wants, best_alone, best_choices
from miss.engine.runtime.search import Choice, Hypothesis
from miss.engine.runtime.slots import Slots
from miss.engine.runtime.stages import stage
from miss.kernels.cross_attention import KV
from miss.models.cross_kv import Shape, new_room, split_layers
from miss.models.vqa import MissVQA


class Runner:
    """`prefill` puts new requests into their slots, `decode` feeds every running one what its search asks for."""

    def __init__(self, model: MissVQA, slots: Slots, images: ImageCache) -> None:
        self.model, self.slots, self.images = model, slots, images
        self.device = slots.cache.self_k.device
        self.num_encoded = self.num_rows = 0
        self._rows = RowTensors(self.device)

    def prefill(self, requests: Sequence[Request]) -> None:
        """Encodes the requests' images (each once) and questions into their question slots; one that memory does not
        suffice for fails."""
        order = {id(image): i for i, image in enumerate(dict.fromkeys(r.image for r in requests))}
        survive(sorted(requests, key=lambda r: order[id(r.image)]), self._prefill)
        for request in requests:
            request.image = None

    def _prefill(self, requests: Sequence[Request]) -> list[None]:
        with stage("image", self.device):
            image_kv, places = self._image_kv(list(dict.fromkeys(_image(r) for r in requests)))
            encoded = self._now()
        with stage("question", self.device):
            prefilled = self._read(requests, image_kv, places)
        for request in requests:
            request.encoded, request.prefilled = encoded, prefilled
        return [None] * len(requests)

    def _read(self, requests: Sequence[Request], image_kv: list[KV], places: dict[RequestImage, int]) -> float:
        """Questions over their images, into their slots; when they were."""
        rows = sorted(requests, key=lambda r: places[_image(r)])
        longest = max(len(r.question_ids) for r in rows)
        ids = torch.tensor([r.question_ids + [0] * (longest - len(r.question_ids)) for r in rows], device=self.device)
        self.model.encode(
            image_kv,
            self._int32([places[_image(r)] for r in rows]),
            ids,
            self._int32([len(r.question_ids) for r in rows]),
            self.slots.cache,
            torch.tensor([r.question_slot for r in rows], device=self.device),
        )
        return self._now()

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
                    return self._beside(tokens, shape, missing, kept, placed)
                self._project(tokens, [slot for slot in placed if slot is not None])
            new = iter(placed)
            slots = [next(new) if slot is None else slot for slot in slots]
        found = {image: slot for image, slot in zip(images, slots, strict=True) if slot is not None}
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

    def _beside(
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
            pixels = torch.stack([torch.from_numpy(image.pixels) for image in new]).to(self.device)
            encoded = self.model.encode_images(pixels)
            self.num_encoded += len(new)
            for i, image in enumerate(new):
                # A row of a batch would hold all of it in memory.
                image.tokens, image.pixels = encoded[i] if len(new) == 1 else encoded[i].clone(), None
                self.images.keep_tokens(image.key, image.tokens)
            if len(new) == len(images):
                return encoded
        return torch.stack([image.tokens for image in images if image.tokens is not None])

    def decode(self, requests: Sequence[Request]) -> None:
        """One step of every request (sorted by question slot): its search's feeds through the model, what it wants to
        know back, and the copies it asks for made in all layers at once. Those that rank are done in one step."""
        with stage("decode", self.device):
            self._decode(requests)

    def _decode(self, requests: Sequence[Request]) -> None:
        moves: list[tuple[int, int]] = []
        going = [request for request in requests if not request.search.done]  # one allowed answer: done before it began
        for request, ranked in survive([r for r in going if isinstance(r.search, Ranking)], self._rank):
            assert isinstance(request.search, Ranking)
            request.search.settle(ranked)
        for request, choices in survive([r for r in going if not isinstance(r.search, Ranking)], self._ask):
            try:
                copies = request.search.advance(choices)
            except ValueError as error:  # of this request alone: probabilities that are none, say
                request.fail(error)
                continue
            moves += [(request.answer_slots[source], request.answer_slots[target]) for source, target in copies]
        self._copy(moves)

    def _rank(self, requests: Sequence[Request]) -> list[list[Hypothesis]]:
        """Every request's candidates, best first. The original's ranking masks a question's padding, unlike its
        generation, so that the cache's lengths are not the questions' own there."""
        lengths = self.slots.cache.question_lengths.clone()
        slots = [request.question_slot for request in requests]
        lengths[slots] = self._int32([len(request.question_ids) for request in requests])
        trees = [request.search.tree for request in requests if isinstance(request.search, Ranking)]
        return rank_questions(self.model, self.slots.cache, slots, trees, lengths)

    def _ask(self, requests: Sequence[Request]) -> list[list[Choice]]:
        """What each search wants to know, a choice a feed. Nothing but the cache's next positions is written, so that
        it may be asked again."""
        asked = [Asked(r.question_slot, r.answer_slots, r.search.feed(), r.search.wants()) for r in requests]
        rows = self._rows.of(asked, self.slots.positions)
        fed = (rows.tokens, self.slots.cache, rows.slots, rows.positions, rows.questions)
        if num_best := best_alone(asked, rows):
            num_best = min(num_best, self.model.config.decoder.vocab_size)
            choices = best_choices(*self.model.decode_best(*fed, num_best), asked)
        else:
            choices = answer_wants(self.model.decoder, self.model.decode(*fed), rows.last, asked)
        for one in asked:
            for feed in one.feeds:
                self.slots.positions[one.slots[feed.branch]] += len(feed.tokens)
        self.num_rows += len(rows.tokens)
        return choices

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        """Copies answer slots (source, target), all at once."""
        if not moves:
            return
        positions = self.slots.positions
        length = max(positions[source] for source, _ in moves)
        pairs = self._int32([source for source, _ in moves] + [target for _, target in moves])
        self.slots.cache.reorder(pairs[: len(moves)], pairs[len(moves) :], length)
        held = [positions[source] for source, _ in moves]
        for (_, target), count in zip(moves, held, strict=True):
            positions[target] = count

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _now(self) -> float:
        """The time once the device has done what it was given, so that a stage's time is its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def _image(request: Request) -> RequestImage:
    assert request.image is not None
    return request.image
