"""What a caller gets: an answer, its score, and the others that were near.

Knows hypotheses and texts; does not know models, or how an answer was chosen.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from miss.engine.runtime.search import Hypothesis


@dataclass(frozen=True)
class Alternative:
    """Another answer: text, logprob, and score = exp(logprob); the rest as an `Answer`'s."""

    text: str
    score: float
    logprob: float
    token_ids: list[int]
    beam_score: float | None = None
    logprob_unconstrained: float | None = None
    token_logprobs: list[float] | None = None
    finished: bool = True
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Answer:
    """An answer and how sure the model was.

    score: exp(logprob), the probability of exactly this token sequence.
    logprob: sum of the generated tokens' log-probabilities, the closing [SEP] included, under the full softmax (under a
        constraint: that of what is allowed, with `logprob_unconstrained` beside it where it was asked for).
    token_ids: the generated tokens; the last is [SEP] unless max_new_tokens ran out first (`finished` is False then).
    alternatives: other answers, best first.
    seconds: of this answer's own time from asking to its end, in which others may have been worked on, too: image
        (reading and encoding it), queue, question, decode; total is their sum.
    warnings: what the caller should know (a question that was cut, an image with burned-in text).
    token_logprobs: of each token, summing to `logprob`; None where only the sum is known (a list of answers).
    top_logprobs: of each token's place the likeliest (token id, log-probability), best first; None unless asked for.
    """

    text: str
    score: float
    logprob: float
    token_ids: list[int]
    alternatives: list[Alternative]
    seconds: dict[str, float]
    finished: bool = True
    beam_score: float | None = None
    warnings: list[str] = field(default_factory=list)
    logprob_unconstrained: float | None = None
    token_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_answer(
    hypotheses: list[Hypothesis],
    num_alternatives: int,
    decode: Callable[[list[int]], str],
    seconds: dict[str, float],
    warnings: list[str],
) -> Answer:
    """The first hypothesis as the answer, the next ones as alternatives; `decode` makes text of token ids."""
    best, *others = (
        Alternative(
            *(decode(h.token_ids), math.exp(h.logprob), h.logprob, h.token_ids, h.beam_score, h.logprob_unconstrained),
            h.token_logprobs if len(h.token_logprobs) == len(h.token_ids) else None,
            h.finished,
            h.top_logprobs or None,
        )
        for h in hypotheses[: 1 + num_alternatives]
    )
    return Answer(
        best.text,
        best.score,
        best.logprob,
        best.token_ids,
        others,
        seconds,
        hypotheses[0].finished,
        best.beam_score,
        warnings,
        best.logprob_unconstrained,
        best.token_logprobs,
        best.top_logprobs,
    )
