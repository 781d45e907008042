"""How a next token is chosen: greedy with alternatives, and beam search in two behaviours.

Knows log-probabilities and hypotheses; does not know models, caches or text.
"""

from dataclasses import dataclass, field

from miss.engine.runtime.search import Hypothesis
from miss.models.config import Behaviour


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of one answer; None takes the checkpoint's default.

    num_beams: 1 is greedy.
    max_new_tokens: the closing [SEP] included.
    num_alternatives: how many other answers are reported. Greedy completes the next-best first tokens; beam search
        reports its other hypotheses, so it has at most `num_beams - 1`.
    """

    num_beams: int | None = None
    max_new_tokens: int | None = None
    num_alternatives: int = 2

    def __post_init__(self) -> None:
        for name, least in (("num_beams", 1), ("max_new_tokens", 1), ("num_alternatives", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: got {value!r}; wanted a whole number of at least {least}")


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
