"""How a next token is chosen: what a caller may ask, greedy with alternatives, and beam search in two behaviours.

Knows log-probabilities and hypotheses; does not know models, caches or text.
"""

from dataclasses import dataclass, field

from miss.engine.runtime.candidates import Candidates
from miss.engine.runtime.constrained import Constrained
from miss.engine.runtime.ranker import Ranking
from miss.engine.runtime.sampling import Sampling
from miss.engine.runtime.search import Ahead, Choice, Feed, Hypothesis, Search, Wants
from miss.models.config import Behaviour, MissConfig


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of one answer; None takes the checkpoint's default.

    num_beams: 1 is greedy.
    max_new_tokens: the closing [SEP] included.
    num_alternatives: how many other answers are reported. Greedy completes the next-best first tokens; beam search
        reports its other hypotheses, so it has at most `num_beams - 1`; sampling draws so many more; of candidates they
        are the next best; under a constraint those whose probability is known without more work.
    temperature: 0 takes the likeliest token; above 0 tokens are drawn from logits divided by it.
    top_p, top_k: of a draw, only the likeliest tokens that together have this probability, or that many (0: all).
    seed: of the draws, so that they can be repeated; None takes a new one.
    candidates: the answers to rank; nothing else is answered. Doubles count once.
    constrain: the answers that may be generated, one of which is. Doubles count once.
    jump_forward: under a constraint, tokens that are forced are not asked for one by one; the answer is the same.
    logprob_unconstrained: under a constraint, report the log-probability under the full vocabulary, too.
    top_logprobs: of a greedy answer, that many likeliest tokens at each place are reported.
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
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("num_beams", 1),
            ("max_new_tokens", 1),
            ("num_alternatives", 0),
            ("top_k", 0),
            ("seed", 0),
            ("top_logprobs", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}: got {value!r}; wanted a whole number of at least {least}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature!r}; wanted a number of at least 0")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p!r}; wanted a number above 0, up to 1")
        for name in ("candidates", "constrain"):
            self._check_list(name)
        self._check_together()

    def _check_list(self, name: str) -> None:
        texts = getattr(self, name)
        if texts is None:
            return
        if isinstance(texts, str) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{name}: got {texts!r}; wanted a list of texts, none of them empty")
        if not texts:
            raise ValueError(f"{name}: got an empty list; wanted at least one answer to choose from")
        object.__setattr__(self, name, tuple(dict.fromkeys(texts)))

    def _check_together(self) -> None:
        beams = (self.num_beams or 1) > 1
        asked = {
            "candidates": self.candidates is not None,
            "constrain": self.constrain is not None,
            f"temperature {self.temperature}": self.temperature > 0,
            f"num_beams {self.num_beams}": beams,
        }
        together = [name for name, is_asked in asked.items() if is_asked]
        if len(together) > 1:
            raise ValueError(
                f"got {' together with '.join(together)}; give one of them: each chooses answers its own way"
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k or self.seed is not None):
            raise ValueError(
                f"got top_p {self.top_p}, top_k {self.top_k}, seed {self.seed} at temperature 0; wanted a temperature "
                "above 0, or none of them"
            )
        if self.top_logprobs and together:
            raise ValueError(
                f"got top_logprobs together with {together[0]}; wanted a greedy answer, or no top_logprobs"
            )
        if self.logprob_unconstrained and self.constrain is None:
            raise ValueError("got logprob_unconstrained without constrain; wanted both, or neither")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def make_search(params: SamplingParams, config: MissConfig, candidates: Candidates | None = None) -> Search:
    """The search that answers one request as `params` ask.

    Args:
        candidates: of params.candidates or params.constrain, where there are any.
    """
    tokens, longest = config.tokens, params.max_new_tokens or config.generation.max_new_tokens
    others = params.num_alternatives
    if params.candidates is not None:
        assert candidates is not None, "candidates come tokenised"
        return Ranking(candidates.tree)
    if params.constrain is not None:
        assert candidates is not None, "allowed answers come tokenised"
        return Constrained(candidates.trie, tokens.dec, others, params.jump_forward, params.logprob_unconstrained)
    if params.temperature > 0:
        cut = params.temperature, params.top_k, params.top_p
        return Sampling(tokens.dec, tokens.sep, longest, *cut, params.seed, others)
    width = params.num_beams or config.generation.num_beams
    if width == 1:
        return Greedy(tokens.dec, tokens.sep, longest, others, params.top_logprobs)
    if params.top_logprobs:
        raise ValueError(f"got top_logprobs with the checkpoint's {width} beams; give num_beams 1 for a greedy answer")
    return Beams(tokens.dec, BeamSearch(width, tokens.sep, config.behaviour), longest)


class Greedy:
    """Branch 0 is the greedy answer; branch j starts with the (j+1)-th best first token and is greedy from there."""

    streams = True

    def __init__(self, dec: int, sep: int, max_new_tokens: int, num_alternatives: int = 0, num_top: int = 0) -> None:
        self.branches = 1 + num_alternatives
        self._sep, self._left, self._num_top = sep, max_new_tokens, num_top
        self._grown: list[Hypothesis] = []
        self._feeds, self._wants = [Feed(0, (dec,))], Wants(num_best=max(self.branches, num_top))

    @property
    def done(self) -> bool:
        return not self._feeds or self._left == 0

    @property
    def hypotheses(self) -> list[Hypothesis]:
        return [*self._grown[:1], *sorted(self._grown[1:], key=lambda h: -h.logprob)]

    def feed(self) -> list[Feed]:
        return self._feeds

    def wants(self) -> Wants:
        return self._wants

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        copies: list[tuple[int, int]] = []
        if not self._grown:
            best, top = choices[0].best[: self.branches], self._top(choices[0])  # fewer where there are no more tokens
            self._grown = [Hypothesis().extended(token, logprob, self._sep, top) for token, logprob in best]
            active = list(range(len(self._grown)))
            copies = [(0, branch) for branch in active[1:] if not self._grown[branch].finished]
            self._wants = Wants(num_best=max(1, self._num_top))
        else:
            active = [feed.branch for feed in self._feeds]
            for branch, choice in zip(active, choices, strict=True):
                self._grown[branch] = self._grown[branch].extended(*choice.best[0], self._sep, self._top(choice))
        self._left -= 1
        self._feeds = [Feed(b, (self._grown[b].token_ids[-1],)) for b in active if not self._grown[b].finished]
        return [] if self.done else copies

    def _top(self, choice: Choice) -> list[tuple[int, float]] | None:
        return choice.best[: self._num_top] if self._num_top else None

    def ahead(self, steps: int) -> list[Ahead] | None:
        """Once the first tokens are chosen, which is one choice for all branches; never where other tokens are wanted,
        too, which a step that is made ahead does not report."""
        if self._num_top or not self._grown and self.branches > 1:
            return None
        return [Ahead(self._left, self._sep)] * len(self._feeds)


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


class Beams:
    """A `BeamSearch` whose beam b lives in branch b; all of them read the question's one state."""

    streams = False

    def __init__(self, dec: int, search: BeamSearch, max_new_tokens: int) -> None:
        self.branches = search.num_beams
        self._dec, self._search, self._left = dec, search, max_new_tokens
        self._wants = Wants(num_best=2 * search.num_beams)
        self._finished: list[Hypothesis] | None = None

    @property
    def done(self) -> bool:
        return self._finished is not None

    @property
    def hypotheses(self) -> list[Hypothesis]:
        return self._search.open if self._finished is None else self._finished

    def feed(self) -> list[Feed]:
        return [Feed(b, ((h.token_ids or [self._dec])[-1],)) for b, h in enumerate(self._search.open)]

    def wants(self) -> Wants:
        return self._wants

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        count = self._wants.num_best
        options = [
            (beam, token, logprob)
            for beam, choice in enumerate(choices)
            for token, logprob in choice.best[:count]  # of each beam's own best: no others can be among all beams' best
        ]
        so_far = [hypothesis.logprob for hypothesis in self._search.open]
        options.sort(key=lambda option: so_far[option[0]] + option[2], reverse=True)
        parents = self._search.advance(options[:count])
        self._left -= 1
        if self._search.done or self._left == 0:
            self._finished = self._search.finish()
            return []
        return [(parent, beam) for beam, parent in enumerate(parents) if parent != beam]

    def ahead(self, steps: int) -> None:
        return None
