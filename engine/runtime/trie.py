"""The answers that are allowed, as a trie of token ids in flat arrays.

Knows token ids; does not know text, probabilities or who walks through it.

Nodes are numbered level by level, the children of a node by token id, so that they stand together: the node that an
edge leads to is the edge's number + 1, and two arrays are the whole trie. An answer ends at a leaf, and nowhere else,
because its last token is a closing one that stands nowhere else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROOT = 0


@dataclass(eq=False)
class AnswerTrie:
    """N nodes, N - 1 edges; node n's edges are first_edge[n] … first_edge[n + 1] - 1.

    answers: each distinct answer's tokens, the closing one included, in the order in which they were given.
    first_edge: int64 (N + 1,). edge_token: int64 (N - 1,), ascending within a node. parent, depth: int64 (N,), the
    root's are -1 and 0. answer: int64 (N,), which answer ends in a leaf; -1 in an inner node.
    """

    answers: list[tuple[int, ...]]
    first_edge: Ints
    edge_token: Ints
    parent: Ints
    depth: Ints
    answer: Ints
    _children: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def build(cls, answers: Iterable[Sequence[int]], end: int) -> "AnswerTrie":
        """Of answers without their closing token `end`, which is put behind each; the same tokens twice are one answer.

        Raises:
            ValueError: there is none, one is empty, or one holds `end`.
        """
        whole = list(dict.fromkeys((*map(int, tokens), end) for tokens in answers))
        if not whole:
            raise ValueError("got no answers; wanted at least one")
        for tokens in whole:
            if len(tokens) == 1 or end in tokens[:-1]:
                raise ValueError(
                    f"got an answer of tokens {list(tokens[:-1])}; wanted at least one, and {end}, which ends it, not "
                    "among them"
                )
        return cls(whole, *_levels(whole))

    @cached_property
    def index(self) -> dict[tuple[int, ...], int]:
        """Which answer has these tokens, the closing one included."""
        return {tokens: i for i, tokens in enumerate(self.answers)}

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer, the closing one included."""
        return int(self.depth[-1])

    def tokens(self, node: int) -> tuple[int, ...]:
        """The tokens that lead on from a node, ascending; none from a leaf. Remembered: a root with a thousand
        children takes 20 us to list, and every question asks for it."""
        found = self._children.get(node)
        if found is None:
            found = tuple(self.edge_token[self.first_edge[node] : self.first_edge[node + 1]].tolist())
            self._children[node] = found
        return found

    def child(self, node: int, choice: int) -> int:
        """The node behind the `choice`-th of `tokens(node)`."""
        return int(self.first_edge[node]) + choice + 1

    def forced(self, node: int) -> tuple[list[int], int]:
        """The tokens that must follow a node, and the node where there is a choice again, or nothing more."""
        chain: list[int] = []
        while len(tokens := self.tokens(node)) == 1:
            chain.append(tokens[0])
            node = self.child(node, 0)
        return chain, node

    def ends(self, node: int) -> int | None:
        """Which answer ends in this node; None in an inner one."""
        found = int(self.answer[node])
        return None if found < 0 else found


def _levels(answers: list[tuple[int, ...]]) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Breadth first over the sorted answers: those below a node stand together, so a node is a range of them."""
    order = sorted(range(len(answers)), key=answers.__getitem__)
    level, first_edge = [(0, len(order), ROOT)], [0]
    token, parent, depth, answer = list[int](), [-1], [0], [-1]
    while level:
        below: list[tuple[int, int, int]] = []
        for start, stop, node in level:
            at = depth[node]
            while start < stop and at < len(answers[order[start]]):
                same, next_token = start + 1, answers[order[start]][at]
                while same < stop and answers[order[same]][at] == next_token:
                    same += 1
                below.append((start, same, len(parent)))
                token.append(next_token)
                parent.append(node)
                depth.append(at + 1)
                answer.append(order[start] if at + 1 == len(answers[order[start]]) else -1)
                start = same
            first_edge.append(len(token))
        level = below
    first, edges, parents, depths, ends = (
        np.array(x, dtype=np.int64) for x in (first_edge, token, parent, depth, answer)
    )
    return first, edges, parents, depths, ends
