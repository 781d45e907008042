"""The template writer: captions from sentence frames, the baseline that language models are held against.

Knows frames; does not know files, cleaning or language models.
"""

from collections.abc import Sequence

from miss.engine.transcap.labels import LabelSet
from miss.engine.transcap.sentences import VERSION, captions
from miss.engine.transcap.writer import Candidate, Written, number


class TemplateWriter:
    """Sentence frames, drawn by the seed; no model."""

    name = "template"
    prompt = None

    @property
    def identity(self) -> dict[str, str]:
        return {"model": "template", "revision": VERSION}

    def prepare(self) -> None:
        """There is nothing to load."""

    def write(self, sets: Sequence[LabelSet], wanted: int, seed: int) -> list[Written]:
        return [Written([Candidate(text) for text in captions(s.facts, wanted, number(seed, s.key))]) for s in sets]
