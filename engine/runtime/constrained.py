"""Answers from a list of allowed ones: the likeliest token among those that an allowed answer can go on with.

Knows a trie of token ids and log-probabilities; does not know models, caches or text.

Probabilities are renormalised over what is allowed, so that a token without alternative costs nothing and need not be
computed: where the rest of the answer is forced it is done at once, and what is forced within it goes into the cache
together with the next step's choice (jump-forward). Between yes and no the first step decides.
"""

import math
from dataclasses import replace

import numpy as np

from miss.engine.runtime.search import Choice, Feed, Hypothesis, Wants
from miss.engine.runtime.trie import ROOT, AnswerTrie


class Constrained:
    """Greedy over the trie.

    `hypotheses`: the answer, then those others whose probability under the constraint is known without another step,
    best first: the ones that part from the answer at a choice and are forced from there. An answer that leads on into
    further choices has none yet, and is not reported.

    Args:
        trie: whose answers are allowed.
        dec: the token that begins every answer.
        num_alternatives: how many others are reported at most.
        jump_forward: False feeds and asks for every token by itself: the same answer and score, more steps.
        unconstrained: also sums the log-probabilities under the full vocabulary's softmax (of the answer; of an
            alternative they are not known). Forced tokens are then computed, too.
    """

    branches = 1
    streams = True

    def __init__(
        self,
        trie: AnswerTrie,
        dec: int,
        num_alternatives: int = 0,
        jump_forward: bool = True,
        unconstrained: bool = False,
    ) -> None:
        self.trie, self.num_alternatives, self.jumps = trie, num_alternatives, jump_forward and not unconstrained
        self._answer = Hypothesis(logprob_unconstrained=0.0 if unconstrained else None)
        self._others: list[Hypothesis] = []
        self._node, self._pending = ROOT, [dec]
        self._jump()

    @property
    def done(self) -> bool:
        return self._answer.finished

    @property
    def hypotheses(self) -> list[Hypothesis]:
        others = sorted(self._others, key=lambda other: -other.logprob)
        return [self._answer, *others[: self.num_alternatives]]

    def feed(self) -> list[Feed]:
        return [Feed(0, tuple(self._pending))]

    def wants(self) -> Wants:
        return Wants(allowed=(self.trie.tokens(self._node),))

    def ahead(self, steps: int) -> None:
        return None

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        (choice,) = choices
        logprobs = np.array(choice.allowed, dtype=np.float64)
        renormalised = logprobs - _log_sum_exp(logprobs)
        best = int(renormalised.argmax())  # the first, so the lowest id, of equal ones
        if self.num_alternatives:
            self._note_others(best, renormalised)
        if self._answer.logprob_unconstrained is not None:
            self._answer.logprob_unconstrained += choice.allowed[best]
        self._pending = []
        self._take(best, float(renormalised[best]))
        self._jump()
        return []

    def _take(self, choice: int, logprob: float) -> None:
        token = self.trie.tokens(self._node)[choice]
        self._node = self.trie.child(self._node, choice)
        self._pending.append(token)
        finished = self.trie.ends(self._node) is not None
        answer = self._answer
        self._answer = replace(
            answer, token_ids=[*answer.token_ids, token], logprob=answer.logprob + logprob, finished=finished
        )

    def _jump(self) -> None:
        while self.jumps and not self.done and len(self.trie.tokens(self._node)) == 1:
            self._take(0, 0.0)

    def _note_others(self, best: int, renormalised: np.ndarray) -> None:
        """Those that are forced after this choice; only as many as can be reported, the root may have a thousand."""
        tokens = self.trie.tokens(self._node)
        worth: list[Hypothesis] = []
        for choice in np.argsort(-renormalised, kind="stable").tolist():
            if len(worth) == self.num_alternatives:
                break
            if choice == best:
                continue
            chain, last = self.trie.forced(self.trie.child(self._node, choice))
            if self.trie.ends(last) is not None:
                logprob = self._answer.logprob + float(renormalised[choice])
                worth.append(Hypothesis([*self._answer.token_ids, tokens[choice], *chain], logprob, True))
        self._others += worth


def _log_sum_exp(logprobs: np.ndarray) -> float:
    """0-dimensional cases included: of one number exactly that number, so that what is forced costs exactly nothing."""
    most = float(logprobs.max())
    return most + math.log(float(np.exp(logprobs - most).sum()))
