"""Ranking a list of answers: hundreds of candidates a question, scored in full by one pass over their packed tree.

Knows the decoder's tree pass and a cache that holds the questions; does not know text, requests or slots' owners.

`correct`: a candidate's score is its log-probability, the closing [SEP] included, under the full vocabulary's softmax.
`compat` is the original's (and BLIP's): the 128 candidates whose first token is the likeliest, then the negative
training loss, label smoothing of 0.1 included, as `beam_score`.

Shapes: Q questions, N nodes of a pass, E edges, C width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miss.engine.runtime.candidate_tree import MOST_NODES, CandidateTree, Part
from miss.engine.runtime.search import Choice, Feed, Hypothesis, Wants
from miss.models.cache import KVCache
from miss.models.vqa import MissVQA

COMPAT_KEPT = 128  # k_test of the original
COMPAT_SMOOTHING = 0.1
_HEAD_ROWS = 512  # at a time: an implementation that makes logits makes 62 MB of them


class Ranking:
    """The search of a request that ranks: nothing is fed, it waits to be told how its candidates scored."""

    branches = 0
    streams = False

    def __init__(self, tree: CandidateTree) -> None:
        self.tree = tree
        self.hypotheses: list[Hypothesis] = []

    @property
    def done(self) -> bool:
        return bool(self.hypotheses)

    def settle(self, ranked: list[Hypothesis]) -> None:
        """Takes its candidates, best first."""
        self.hypotheses = ranked

    def feed(self) -> list[Feed]:
        return []

    def wants(self) -> Wants:
        return Wants()

    def ahead(self, steps: int) -> None:
        return None

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        assert not choices, "a ranking feeds nothing"
        return []


@dataclass(frozen=True)
class _Job:
    """One part of one question's list."""

    question: int  # which of those asked
    slot: int
    part: Part


@torch.inference_mode()
def rank_questions(
    model: MissVQA,
    cache: KVCache,
    question_slots: list[int],
    candidates: list[CandidateTree],
    question_lengths: Tensor | None = None,
    most_nodes: int = MOST_NODES,
) -> list[list[Hypothesis]]:
    """Each question's candidates, best first; of equal scores the one that stands first in the list.

    Args:
        question_slots: where the questions' states are in the cache; any order.
        candidates: each question's list; the same object for the same list.
        question_lengths: int32 (slots of the cache,), where not the cache's: the original's ranking masks the padding
            that its generation attends to, so that it does not depend on the batch.
        most_nodes: of a pass, for questions together; a tree's parts have their own bound.
    """
    compat = model.config.behaviour == "compat"
    lengths = cache.question_lengths if question_lengths is None else question_lengths
    ranker = Ranker(model, cache, lengths, most_nodes)
    if compat:
        candidates = ranker.likeliest_starts(question_slots, candidates)
    order = sorted(range(len(question_slots)), key=question_slots.__getitem__)
    jobs = [_Job(q, question_slots[q], part) for q in order for part in candidates[q].parts]
    found: list[list[tuple[int, Hypothesis]]] = [[] for _ in question_slots]
    for job, logprobs, scores in ranker.scores(jobs, COMPAT_SMOOTHING if compat else 0.0):
        answers = candidates[job.question].answers
        for i, logprob, score in zip(job.part.answers.tolist(), logprobs, scores, strict=True):
            hypothesis = Hypothesis(list(answers[i]), logprob, True, score if compat else None)
            found[job.question].append((i, hypothesis))
    return [[h for _, h in sorted(each, key=_best_first)] for each in found]


def _best_first(candidate: tuple[int, Hypothesis]) -> tuple[float, int]:
    place, hypothesis = candidate
    return -(hypothesis.logprob if hypothesis.beam_score is None else hypothesis.beam_score), place


class Ranker:
    """Passes over the questions that a cache holds."""

    def __init__(self, model: MissVQA, cache: KVCache, lengths: Tensor, most_nodes: int) -> None:
        self.decoder, self.dec = model.decoder, model.config.tokens.dec
        self.device = cache.cross_k.device
        self.question_kv = [cache.question(i) for i in range(model.config.decoder.num_layers)]
        self.lengths, self.most_nodes = lengths, most_nodes

    def scores(self, jobs: list[_Job], smoothing: float) -> Iterator[tuple[_Job, list[float], list[float]]]:
        """For each job, sorted by slot, its answers' log-probabilities, and the same smoothed."""
        for group in self._passes(jobs):
            of_edges = self._edges(group, smoothing)
            start = 0
            for job in group:
                edges = slice(start, start := start + len(job.part.edge_token))
                plain, smoothed = (job.part.sums(each[edges]).tolist() for each in of_edges)
                yield job, plain, smoothed

    def likeliest_starts(self, slots: list[int], candidates: list[CandidateTree]) -> list[CandidateTree]:
        """Each list cut to the candidates with the likeliest first tokens; a list that is short enough stays."""
        chosen = list(candidates)
        long = [q for q in range(len(slots)) if len(candidates[q].answers) > COMPAT_KEPT]
        if not long:
            return chosen
        order = sorted(long, key=slots.__getitem__)
        roots, zeros = [self.dec] * len(order), [0] * len(order)
        states = self._states(roots, zeros, np.arange(len(order))[:, None], [slots[q] for q in order])
        for q, state in zip(order, states.split(1), strict=True):
            first = self._whole([answer[0] for answer in candidates[q].answers])
            logits = self.decoder.logits_at(state, first[None])[0].double().cpu().numpy()
            chosen[q] = candidates[q].subset(sorted(np.argsort(-logits, kind="stable")[:COMPAT_KEPT].tolist()))
        return chosen

    def _passes(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        group: list[_Job] = []
        num_nodes = 0
        for job in jobs:
            if group and num_nodes + len(job.part.ids) > self.most_nodes:
                yield group
                group, num_nodes = [], 0
            group.append(job)
            num_nodes += len(job.part.ids)
        if group:
            yield group

    def _edges(self, group: list[_Job], smoothing: float) -> tuple[np.ndarray, np.ndarray]:
        """float64 (E,) twice, over all edges of a pass: log-probabilities, and the same smoothed."""
        parts = [job.part for job in group]
        sizes = [len(part.ids) for part in parts]
        starts = np.cumsum([0, *sizes[:-1]])
        longest = max(part.ancestors.shape[1] for part in parts)
        ancestors = np.full((sum(sizes), longest), -1, dtype=np.int32)
        for part, start, size in zip(parts, starts, sizes, strict=True):
            rows = ancestors[start : start + size, : part.ancestors.shape[1]]
            np.copyto(rows, np.where(part.ancestors < 0, -1, part.ancestors + start))
        ids = np.concatenate([part.ids for part in parts])
        depths = np.concatenate([part.depths for part in parts])
        slots = np.repeat([job.slot for job in group], sizes)
        states = self._states(np.where(ids < 0, self.dec, ids), depths, ancestors, slots)
        nodes = np.concatenate([part.edge_node + start for part, start in zip(parts, starts, strict=True)])
        tokens = np.concatenate([part.edge_token for part in parts])
        return self._logprobs(states, self._whole(nodes), self._whole(tokens), smoothing)

    def _states(self, ids: Any, depths: Any, ancestors: Any, slots: Any) -> Tensor:
        ids, depths, ancestors, slots = map(self._whole, (ids, depths, ancestors, slots))
        return self.decoder.tree(ids, depths, ancestors, self.question_kv, slots.to(torch.int32), self.lengths)

    def _logprobs(
        self, states: Tensor, nodes: Tensor, tokens: Tensor, smoothing: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The head for every node, of which only the log-sum-exp is kept, and of each edge its one logit."""
        sums = [self._head(some, smoothing) for some in states.split(_HEAD_ROWS)]
        total, mean = (torch.cat(parts).double() for parts in zip(*sums, strict=True))
        logits = [
            self.decoder.logits_at(states.index_select(0, n), t[:, None])[:, 0]
            for n, t in zip(nodes.split(_HEAD_ROWS), tokens.split(_HEAD_ROWS), strict=True)
        ]
        plain = torch.cat(logits).double() - total[nodes]
        smoothed = (1 - smoothing) * plain + smoothing * (mean - total)[nodes] if smoothing else plain
        return plain.cpu().numpy(), smoothed.cpu().numpy()

    def _head(self, states: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """(N,) twice: the log-sum-exp of each node's logits, and their mean where it is wanted."""
        if not smoothing:
            total = self.decoder.best(states, 1)[2]
            return total, total
        logits = self.decoder.logits(states)
        return logits.logsumexp(-1), logits.mean(-1)

    def _whole(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self.device)
