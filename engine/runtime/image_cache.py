"""Encoded images kept for the next question about them: their tokens, and above them every layer's keys and values.

Knows keys, tensors and a budget in bytes; does not know how an image is encoded, or who asks.

Tokens cost an encoded image's time again and little memory (base at 384 pixels: 577 x 768 numbers), keys and values one
product's time and 24 times that memory. So each tier has its own share of the budget, and evicts its own least recently
used: many images seen once do not drive out the keys and values of the one that is asked about.

Shapes: P pool slots, I images, N tokens, C width, H heads, D head width.
"""

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from miss.kernels.cross_attention import KV
from miss.models.cross_kv import Shape, new_room, split_layers

KV_SHARE = 0.75  # of the budget, to keys and values


@dataclass
class TierCounts:
    """Look-ups by images that were, or were not, in a tier, what it evicted, and what it holds."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    num_images: int = 0
    bytes: int = 0


class ImageCache:
    """Two tiers under `budget` bytes. An image with keys and values always has its tokens, too.

    Keys and values lie in one tensor (P, N, layers, 2, H, D), so that a batch whose images are all kept reads them in
    place by their slots. Safe to ask from several threads; only the one that encodes stores.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tokens_tier, self.kv_tier = TierCounts(), TierCounts()
        self._lock = threading.Lock()
        self._tokens: OrderedDict[bytes, Tensor] = OrderedDict()
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._pool: Tensor | None = None
        self._each = self._pool_size = 0  # bytes
        self._free: list[int] = []

    def tokens(self, key: bytes) -> Tensor | None:
        """The image's tokens (N, C), where they are kept."""
        with self._lock:
            found = self._tokens.get(key)
            if found is None:
                self.tokens_tier.misses += 1
                return None
            self.tokens_tier.hits += 1
            self._tokens.move_to_end(key)
            return found

    def holds(self, key: bytes) -> bool:
        """Whether `tokens` would find the image; asking changes nothing."""
        with self._lock:
            return key in self._tokens

    def keep_tokens(self, key: bytes, tokens: Tensor) -> None:
        """Keeps tokens (N, C), in memory of their own, where the budget has room for any."""
        size = tokens.numel() * tokens.element_size()
        with self._lock:
            room = self.budget - (int(self.budget * KV_SHARE) if self._pool is None else self._pool_size)
            if size > room or key in self._tokens:
                return
            while self.tokens_tier.bytes + size > room:
                self._evict_tokens(size)
            self._tokens[key] = tokens
            self.tokens_tier.bytes += size
            self.tokens_tier.num_images = len(self._tokens)

    def kv_slots(self, keys: list[bytes]) -> list[int | None]:
        """Where in the pool each image's keys and values are, if they are kept."""
        with self._lock:
            found = [self._slots.get(key) for key in keys]
            for key, slot in zip(keys, found, strict=True):
                if slot is None:
                    self.kv_tier.misses += 1
                else:
                    self.kv_tier.hits += 1
                    self._slots.move_to_end(key)
                    self._tokens.move_to_end(key)
            return found

    @contextmanager
    def reserved(self, keys: list[bytes], tokens: Tensor, shape: Shape, in_use: set[int]) -> Iterator[list[int | None]]:
        """Slots for the keys and values of images with `tokens` (I, N, C), to be written while the context lasts; None
        for an image that finds no room beside those `in_use` (and these). Given back where the writing fails.

        shape: (layers, 2, H, D).
        """
        with self._lock:
            if self._pool is None or self._pool.dtype != tokens.dtype:
                self._allocate(tokens, shape)
            placed: list[int | None] = []
            for key in keys:
                slot = self._place(key, in_use) if key in self._tokens else None
                in_use = in_use if slot is None else in_use | {slot}
                placed.append(slot)
        try:
            yield placed
        except BaseException:
            with self._lock:
                for key, slot in zip(keys, placed, strict=True):
                    if slot is not None and self._slots.get(key) == slot:
                        heapq.heappush(self._free, self._slots.pop(key))
                self._count_kv()
            raise

    @property
    def has_pool(self) -> bool:
        return self._pool is not None

    @property
    def pool(self) -> Tensor:
        """(P, N, layers, 2, H, D)."""
        assert self._pool is not None, "nothing was ever kept"
        return self._pool

    def layers(self, slots: Sequence[int]) -> tuple[list[KV], int]:
        """The part of the pool that holds `slots`, as every layer reads it: K and V (last - first + 1, N, H, D), and
        the first slot."""
        first = min(slots)
        return split_layers(self.pool[first : max(slots) + 1]), first

    def clear(self) -> None:
        """Forgets every image: whoever changes the weights calls this. The pool's memory stays its own."""
        with self._lock:
            self._tokens.clear()
            self._slots.clear()
            self._free = [] if self._pool is None else list(range(len(self._pool)))
            for tier in (self.tokens_tier, self.kv_tier):
                tier.num_images = tier.bytes = 0

    def _allocate(self, tokens: Tensor, shape: Shape) -> None:
        self._each = tokens.shape[1] * math.prod(shape) * tokens.element_size()
        count = int(self.budget * KV_SHARE) // self._each
        self._pool_size = count * self._each
        # Pages of the pool take memory once they are written.
        self._pool = new_room(tokens, count, tokens.shape[1], shape, stays=True)
        self._free = list(range(count))
        self._slots.clear()  # what they named lay in another pool

    def _place(self, key: bytes, in_use: set[int]) -> int | None:
        """A pool slot for `key`, the least recently used one's if there is no free one."""
        slot = self._take_free(in_use)
        if slot is None:
            victim = next((k for k, s in self._slots.items() if s not in in_use), None)
            if victim is None:
                return None
            slot = self._slots.pop(victim)
            self.kv_tier.evictions += 1
        self._slots[key] = slot
        self._count_kv()
        return slot

    def _take_free(self, in_use: set[int]) -> int | None:
        """The lowest free slot. One that is in use is free where its image's tokens were evicted in this very batch."""
        busy = []
        while self._free and self._free[0] in in_use:
            busy.append(heapq.heappop(self._free))
        slot = heapq.heappop(self._free) if self._free else None
        for one in busy:
            heapq.heappush(self._free, one)
        return slot

    def _evict_tokens(self, size: int) -> None:
        key, tokens = self._tokens.popitem(last=False)
        self.tokens_tier.bytes -= tokens.numel() * tokens.element_size()
        self.tokens_tier.evictions += 1
        if key in self._slots:
            heapq.heappush(self._free, self._slots.pop(key))
            self.kv_tier.evictions += 1
            self._count_kv()

    def _count_kv(self) -> None:
        self.kv_tier.num_images = len(self._slots)
        self.kv_tier.bytes = len(self._slots) * self._each
