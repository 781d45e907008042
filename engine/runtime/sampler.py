"""How a next token is chosen: greedy with alternatives, and beam search in two behaviours.

Knows log-probabilities and hypotheses; does not know models, caches or text.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from miss.engine.runtime.search import Hypothesis
from miss.models.config import Behaviour


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of one answer; None takes the checkpoint's default.

    num_beams: 1 is greedy.
    max_new_tokens: the closing [SEP] included.
    num_alternatives: how many other answers are reported. Greedy completes the next-best first tokens; beam search
        reports its other hypotheses, so it has at most `num_beams - 1`; sampling draws so many more answers.
    temperature: 0 chooses the likeliest token; above it tokens are drawn, and the logits divided by it before.
    top_p, top_k: sampling only from the likeliest tokens that reach this share; from the k likeliest (0: from all).
    seed: of sampling; the same seed gives the same answer, whatever else is answered. None draws one.
    candidates: answers to rank: each is scored in full, the likeliest is the answer.
    constrain: the only answers allowed: chosen token by token, by probabilities renormalised over what is allowed.
    jump_forward: under a constraint, tokens without an alternative cost no step; changes no answer.
    logprob_unconstrained: under a constraint, also the log-probability under the full vocabulary's softmax.
    """

    num_beams: int | None = None
    max_new_tokens: int | None = None
    num_alternatives: int = 2
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    candidates: tuple[str, ...] | None = None
    constrain: tuple[str, ...] | None = None
    jump_forward: bool = True
    logprob_unconstrained: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range, or two that contradict each other."""
        for name, least in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("num_alternatives", 0),
            ("top_k", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}: got {value!r}; wanted a whole number of at least {least}")
        if not _number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature!r}; wanted a number of at least 0")
        if not _number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p!r}; wanted a number above 0, at most 1")
        for name in ("candidates", "constrain"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _texts(name, getattr(self, name)))
        self._check_together()

    def _check_together(self) -> None:
        beams = self.num_beams is not None and self.num_beams > 1
        cut = self.top_p < 1 or self.top_k > 0 or self.seed is not None
        for wrong, message in (
            (self.candidates and self.constrain, "candidates together with constrain; give one of them"),
            (
                self.candidates and self.temperature,
                "candidates together with a temperature; they are ranked, not drawn",
            ),
            (self.constrain and self.temperature, "constrain together with a temperature; it takes the likeliest"),
            (self.candidates and beams, "candidates together with num_beams; they are ranked, each in full"),
            (self.constrain and beams, "constrain together with num_beams; it is greedy"),
            (self.temperature and beams, "a temperature together with num_beams; give one of them"),
            (cut and not self.temperature, "top_p, top_k or seed without a temperature; wanted a temperature above 0"),
            (self.logprob_unconstrained and not self.constrain, "logprob_unconstrained without constrain; give both"),
        ):
            if wrong:
                raise ValueError(f"got {message}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _texts(name: str, given: object) -> tuple[str, ...]:
    """A list of answers as a tuple."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{name}: got {given!r}; wanted a list of answers")
    texts = tuple(given)
    if not texts:
        raise ValueError(f"{name}: got an empty list; wanted at least one answer")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: got {text!r} among the answers; wanted texts that are not empty")
    return texts


@dataclass
class BeamSearch:
    """Beam search for one question; `advance` takes each step's candidates, best first.

    `correct` ranks hypotheses by their log-probability and stops once no open beam can still win: a continuation only
    ever loses probability. `compat` is Transformers 4.15's rule, which the original used: a hypothesis scores
    sum / length with a length that counts [DEC] but not [SEP]; one that ends is kept only from the first `num_beams`
    candidates; the search is done when the worst kept beats the best current sum / length.
    """

    num_beams: int
    sep: int
    behaviour: Behaviour
    open: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    kept: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    def advance(self, candidates: list[tuple[int, int, float]]) -> list[int]:
        """Takes (open beam, token, log-probability of the token) sorted by total, best first; at least 2 * num_beams
        of them where the vocabulary has so many. Returns the parent of each beam that is now open."""
        length = len(self.open[0].token_ids) + 1  # [DEC] and what was generated before this step
        chosen: list[Hypothesis] = []
        parents: list[int] = []
        best: float | None = None
        for rank, (beam, token, logprob) in enumerate(candidates):
            hypothesis = self.open[beam].extended(token, logprob, self.sep)
            best = hypothesis.logprob if best is None else max(best, hypothesis.logprob)
            if hypothesis.finished:
                if self.behaviour == "correct" or rank < self.num_beams:
                    self._keep(hypothesis, length)
            elif len(chosen) < self.num_beams:
                chosen.append(hypothesis)
                parents.append(beam)
            if len(chosen) == self.num_beams:
                break
        self.open = chosen
        self.done = not chosen or self._settled(best if best is not None else 0.0, length)
        return parents

    def finish(self) -> list[Hypothesis]:
        """The hypotheses, best first. Open beams count where the search did not end by itself."""
        if not self.done:
            for hypothesis in self.open:
                self._keep(hypothesis, len(hypothesis.token_ids) + 1)
        return sorted(self.kept, key=self._rank, reverse=True)

    def _rank(self, hypothesis: Hypothesis) -> float:
        return hypothesis.logprob if hypothesis.beam_score is None else hypothesis.beam_score

    def _keep(self, hypothesis: Hypothesis, length: int) -> None:
        if self.behaviour == "compat":
            hypothesis.beam_score = hypothesis.logprob / length
        self.kept.append(hypothesis)
        self.kept = sorted(self.kept, key=self._rank, reverse=True)[: self.num_beams]

    def _settled(self, best: float, length: int) -> bool:
        if len(self.kept) < self.num_beams:
            return False
        worst = self._rank(self.kept[-1])
        if self.behaviour == "compat":
            return worst >= best / length
        return worst >= max(h.logprob for h in self.open)
