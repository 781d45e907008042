"""A list of answers laid out as packed trees, for a decoder that computes every distinct beginning once.

Knows token ids and a bound on nodes; does not know models, probabilities or text.

Shapes: N nodes, L ancestors, E edges, A answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from miss.engine.runtime.trie import AnswerTrie, Ints

MOST_NODES = 2000  # of a pass: at base its widest activations are then 2000 * 3072 * 4 bytes = 25 MB


@dataclass(frozen=True, eq=False)
class Part:
    """One packed tree. Its nodes are what is fed: the trie's without the leaves, which nothing follows.

    answers: int64 (A,), which of the list's end here. ids: int64 (N,), the root's is -1, in whose place the caller puts
    what begins an answer. depths: int64 (N,). ancestors: int32 (N, L), -1 for none.
    edge_node: int64 (E,), the node that an edge leaves. edge_token: int64 (E,).
    """

    answers: Ints
    ids: Ints
    depths: Ints
    ancestors: np.ndarray
    edge_node: Ints
    edge_token: Ints
    _trie: AnswerTrie

    @classmethod
    def of(cls, trie: AnswerTrie, answers: Ints) -> "Part":
        """answers: what the trie's answers are in the whole list."""
        inner = trie.answer < 0
        number = np.cumsum(inner) - 1  # of a node among the inner ones
        depth = trie.depth
        ancestors = np.full((trie.num_nodes, int(depth[inner].max()) + 1), -1, dtype=np.int32)
        for level in range(ancestors.shape[1]):
            nodes = np.flatnonzero((depth == level) & inner)
            ancestors[nodes, :level] = ancestors[trie.parent[nodes], :level]
            ancestors[nodes, level] = number[nodes]
        ids = np.concatenate([[-1], trie.edge_token])
        return cls(answers, ids[inner], depth[inner], ancestors[inner], number[trie.parent[1:]], trie.edge_token, trie)

    def sums(self, of_edges: np.ndarray) -> np.ndarray:
        """float64 (A,), for each of `answers` the sum of what its edges have: of_edges (E,)."""
        total = np.concatenate([[0.0], of_edges.astype(np.float64)])
        starts = np.searchsorted(self._trie.depth, np.arange(1, self._trie.longest + 2))
        for start, stop in zip(starts, starts[1:], strict=False):
            total[start:stop] += total[self._trie.parent[start:stop]]
        leaves = np.flatnonzero(self._trie.answer >= 0)
        found = np.empty(len(leaves))
        found[self._trie.answer[leaves]] = total[leaves]
        return found


class CandidateTree:
    """The answers of a trie in parts of at most `most_nodes` nodes each.

    A list that is longer than a pass may be is cut in the order of its tokens, so that few beginnings are computed in
    two parts.
    """

    def __init__(self, trie: AnswerTrie, end: int, most_nodes: int = MOST_NODES) -> None:
        self.answers, self._end = trie.answers, end
        self.parts = [Part.of(trie, np.arange(len(trie.answers)))]
        if len(self.parts[0].ids) > most_nodes:
            self.parts = [self._part(chosen) for chosen in _cut(trie.answers, most_nodes)]

    def subset(self, chosen: list[int]) -> "CandidateTree":
        """A tree of some answers, numbered as here."""
        new = object.__new__(CandidateTree)
        new.answers, new._end, new.parts = self.answers, self._end, [self._part(chosen)]
        return new

    def _part(self, chosen: list[int]) -> Part:
        trie = AnswerTrie.build((self.answers[i][:-1] for i in chosen), self._end)
        return Part.of(trie, np.array(chosen, dtype=np.int64))


def _cut(answers: list[tuple[int, ...]], most_nodes: int) -> Iterator[list[int]]:
    """Ranges of the sorted answers; an answer brings the nodes that it does not share with the one before it."""
    chosen: list[int] = []
    num_nodes, before = 0, tuple[int, ...]()
    for i in sorted(range(len(answers)), key=answers.__getitem__):
        answer = answers[i]
        shared = next(n for n, pair in enumerate(zip_longest(before, answer)) if pair[0] != pair[1])
        new = len(answer) - 1 - shared  # the root is in every part, the leaf is no node
        if chosen and 1 + num_nodes + new > most_nodes:
            yield chosen
            chosen, num_nodes, new = [], 0, len(answer) - 1
        chosen.append(i)
        num_nodes, before = num_nodes + new, answer
    yield chosen
