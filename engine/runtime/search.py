"""What a way of choosing answers asks of the runner, and what it is told: the seam between the two.

Knows log-probabilities and token ids; does not know models, caches, slots or text.

A request has one `Search`. Before each step it says what to feed and what it wants to know of the distributions that
come of it; after the step it is told, and chooses. It never sees what else shares the batch.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """Tokens that go into one branch in the next step; more than one where they were forced (jump-forward). Only the
    distribution after the last of them is reported."""

    branch: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Wants:
    """What a search needs to know after the next step, the same for each of its feeds.

    num_best: that many best next tokens with their log-probabilities; 0 where it needs none.
    allowed: a list a feed of the token ids whose log-probabilities it needs; None where it needs none.
    logits: whether it needs every logit (sampling).
    """

    num_best: int = 0
    allowed: tuple[tuple[int, ...], ...] | None = None
    logits: bool = False


@dataclass(frozen=True)
class Choice:
    """What is known of the next token after one feed; log-probabilities under the full vocabulary's softmax.

    best: (token id, log-probability), best first, at least `Wants.num_best` of them (or the whole vocabulary).
    allowed: the log-probability of each allowed token, in the order in which they were asked for.
    logits: float32 (V,) on the CPU, where they were asked for.
    drawn: the token that was drawn on the device by the search's own rule, and its log-probability.
    """

    best: list[tuple[int, float]] = field(default_factory=list)
    allowed: list[float] = field(default_factory=list)
    logits: Tensor | None = None
    drawn: tuple[int, float] | None = None


@dataclass(frozen=True)
class Ahead:
    """How a feed's branch goes on by itself, until [SEP] or `left` further tokens, without a word from its search.

    temperature: 0 takes the likeliest token; above 0 it is drawn as `sampling.draw` does, from what top_k and top_p
    leave, at `uniforms`, a number a step.
    """

    left: int
    sep: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    uniforms: tuple[float, ...] = ()


@dataclass
class Hypothesis:
    """An answer in the making.

    token_ids: what was generated after [DEC], the closing [SEP] included once finished.
    logprob: the sum of the tokens' log-probabilities under the full vocabulary's softmax; under a constraint, under
        that of the allowed tokens.
    beam_score: the original's length-normalised rank, `compat` beams only.
    logprob_unconstrained: under a constraint, the sum under the full vocabulary's softmax, where it was asked for.
    token_logprobs: of each token, where they came one by one; empty where only their sum is known.
    top_logprobs: of each token's place the likeliest (token id, log-probability), best first, where asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finished: bool = False
    beam_score: float | None = None
    logprob_unconstrained: float | None = None
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def extended(
        self, token: int, logprob: float, sep: int, top: list[tuple[int, float]] | None = None
    ) -> "Hypothesis":
        token_ids, each = [*self.token_ids, token], [*self.token_logprobs, logprob]
        tops = self.top_logprobs if top is None else [*self.top_logprobs, top]
        return Hypothesis(token_ids, self.logprob + logprob, token == sep, token_logprobs=each, top_logprobs=tops)


class Search(Protocol):
    """One request's way to its answer.

    branches: how many answer slots it needs, fixed for its life. Branch 0 starts empty; the others get their contents
        by copies.
    streams: whether the tokens of hypothesis 0 are final as they come (greedy, sampling; not beams).
    done: nothing more to feed.
    hypotheses: the answers, best first, once done; before that what there is of them.
    """

    branches: int
    streams: bool

    @property
    def done(self) -> bool: ...

    @property
    def hypotheses(self) -> list[Hypothesis]: ...

    def feed(self) -> list[Feed]:
        """What goes into the next step, by branch, ascending; the first feed of branch 0 begins with [DEC]."""
        ...

    def wants(self) -> Wants:
        """What it needs to know after that step."""
        ...

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        """Takes what it wanted, a choice a feed; returns copies (source branch, target branch), all made at once
        before the next step: a branch's cached tokens replace those of another."""
        ...

    def ahead(self, steps: int) -> list[Ahead] | None:
        """How each feed's branch goes on for up to `steps` steps, where that depends on nothing but its own tokens;
        None where the search must see each step."""
        ...
