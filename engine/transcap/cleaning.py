"""What makes a caption fit to be kept: its form, its facts, and that an image's captions are not all the same.

Knows texts and label facts; does not know where either comes from.

Facts are checked against a closed world: every word of a caption must be stated by the labels, mean the same as one
that is, or be one of a short list of words that state nothing. What is in nobody's list is rejected, not believed.
"""

import re
from collections import Counter
from dataclasses import dataclass

from miss.engine.transcap.labels import Facts
from miss.engine.transcap.vocabulary import (
    FINDING_KEYS,
    NEUTRAL,
    OF_FINDINGS,
    Mention,
    concepts,
    mentions,
    stem,
    stems,
    words,
)

FEWEST_WORDS, MOST_WORDS = 3, 25  # the most beyond those of the labels
SAME = 0.75  # of two captions' words and pairs of words: from here on they are the same caption
SENTENCE = re.compile(r"[.!]\s+\S")
STANDING = ("side", "negation")  # concepts that say something about the word beside them


@dataclass(frozen=True)
class Problem:
    """Why a caption is not kept: `rule` is one word of a fixed list, `what` the place."""

    rule: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}" if self.what else self.rule


def tidy(text: str) -> str:
    """One sentence in plain spacing: no list marks, quotes or "Caption:" before it, a full stop behind it."""
    text = " ".join(text.split())
    text = re.sub(r"^(?:[-*•]\s+|\d{1,2}[.)]\s+)", "", text)
    text = re.sub(r"^(?:caption|answer|description)\s*\d*\s*:\s*", "", text, flags=re.IGNORECASE).strip("\"'“”` ")
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


class Cleaner:
    """Judges captions of one label set."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.said = [_said(value) for _, value in facts]
        self.supported = frozenset().union(*(_supported(key, value) for key, value in facts))
        self.label_words = [word for _, value in facts for word in stems(value)]
        found = [value for key, value in facts if key in FINDING_KEYS]
        opened = (
            OF_FINDINGS if any(not _is_normal(value) for value in found) else frozenset({"finding"} if found else ())
        )
        self.open_words = NEUTRAL | opened

    def problems(self, caption: str) -> list[Problem]:
        """All that is wrong with a caption; empty where it may be kept."""
        found = mentions(caption)
        clauses = _clauses(caption)
        misplaced = [*self._misplaced(found, clauses), *self._not_denied(found)]
        form = self._form(caption) or self._twice(found)
        return [*form, *self._missing(found), *self._unsupported(found), *misplaced]

    def _form(self, caption: str) -> list[Problem]:
        tokens = stems(caption)
        most = MOST_WORDS + 2 * len(self.label_words)
        if len(tokens) < FEWEST_WORDS:
            return [Problem("short", f"{len(tokens)} words; wanted {FEWEST_WORDS}")]
        if len(tokens) > most:
            return [Problem("long", f"{len(tokens)} words; accepted {most}")]
        found = [Problem("form", mark) for mark in re.findall(r"[?{}<>|\[\]#*=]|https?:|\n", caption)][:1]
        if len(SENTENCE.findall(caption)) > sum(len(SENTENCE.findall(value)) for _, value in self.facts):
            found.append(Problem("form", "more than one sentence"))
        return found + [Problem("repeats", text) for text in self._repeats(tokens)[:1]]

    def _repeats(self, tokens: tuple[str, ...]) -> list[str]:
        """What is said twice and not so by the labels: a word at once, four words, three of which two state something,
        one that states something more often than they do."""
        own = self.label_words
        twice = [a for a, b in _grams(tokens, 2) if a == b and (a, b) not in _grams(own, 2)]
        for n in (3, 4):
            known = Counter(_grams(own, n))
            grams = [g for g in _grams(tokens, n) if n == 4 or sum(t not in NEUTRAL for t in g) > 1]
            twice += [" ".join(g) for g, count in Counter(grams).items() if count > max(1, known[g])]
        content = Counter(t for t in tokens if t not in NEUTRAL)
        return twice + [t for t, count in content.items() if count > max(1, own.count(t))]

    def _twice(self, found: list[Mention]) -> list[Problem]:
        """A modality or an organ that is named more often than the labels name it."""
        kinds = ("modality", "organ", "plane")
        labels = [m for said in self.said for m in said]
        for name in dict.fromkeys(m.name for m in found if m.concept and m.concept.kind in kinds):
            if _count(name, found) > max(1, _count(name, labels)):
                return [Problem("repeats", name)]
        return []

    def _missing(self, found: list[Mention]) -> list[Problem]:
        names = {m.name for m in found} | {word for m in found for word in m.text.split()}
        return [
            Problem("missing", f"{key} {value}")
            for (key, value), said in zip(self.facts, self.said, strict=True)
            if not all(_is_stated(mention, names) for mention in said)
        ]

    def _unsupported(self, found: list[Mention]) -> list[Problem]:
        wrong = []
        for m in found:
            if m.name in self.supported or (m.concept is None and m.text in self.open_words):
                continue
            if m.concept is not None:
                wrong.append(Problem(m.concept.kind, m.text))
            else:
                wrong.append(Problem("number" if any(c.isdigit() for c in m.text) else "unsupported", m.text))
        return wrong

    def _misplaced(self, found: list[Mention], clauses: list[int]) -> list[Problem]:
        """Sides and negations that stand beside a word of another label: left effusion, right mass swapped."""
        wrong = []
        for at, m in enumerate(found):
            if m.concept is None or m.concept.kind not in STANDING or m.name not in self.supported:
                continue
            near = self._neighbour(found, at, clauses)
            if near is not None and not any(self._stand_together(m, near, said) for said in self.said):
                wrong.append(Problem(m.concept.kind, f"{m.text} {near.text}"))
        return wrong

    def _not_denied(self, found: list[Mention]) -> list[Problem]:
        """Words that a label denies ("no fracture") and the caption states."""
        wrong = []
        for said in self.said:
            if said[0].name != "no" or len(said) == 1:
                continue
            for at, m in enumerate(found):
                near = {n.name for n in found[max(0, at - 4) : at + 4]}
                if m.name == said[1].name and "no" not in near:
                    wrong.append(Problem("negation", f"{m.text} is denied by the labels"))
        return wrong

    def _neighbour(self, found: list[Mention], at: int, clauses: list[int]) -> Mention | None:
        """The word that a side or a negation is about: the next of its clause that states something, else the last
        before it there; where the clause has no other, the last before it, else the next."""
        content = [i for i, m in enumerate(found) if m.concept is not None or m.text not in self.open_words]
        here = [i for i in content if clauses[found[i].start] == clauses[found[at].start]]
        after, before = [i for i in here if i > at], [i for i in here if i < at]
        beyond = [i for i in content if i > at]
        behind = [i for i in content if i < at]
        near = [*after[:1], *before[-1:], *behind[-1:], *beyond[:1]]
        return found[near[0]] if near else None

    @staticmethod
    def _stand_together(mention: Mention, near: Mention, said: list[Mention]) -> bool:
        names = [m.name for m in said]
        alone = [m for m in said if m.name not in NEUTRAL] == [m for m in said if m.name == mention.name]
        return mention.name in names and (alone or near.name in names)


def _clauses(text: str) -> list[int]:
    """For each word, the number of the clause that it stands in."""
    return [number for number, clause in enumerate(re.split(r"[,;:]", text)) for _ in words(clause)]


def _grams(tokens: tuple[str, ...] | list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _said(value: str) -> list[Mention]:
    """What a caption must say for a value: its mentions without articles, and without an abbreviation in brackets."""
    plain = re.sub(
        r"\((\w+)\)", lambda m: " " if _abbreviates(m[1].lower(), value[: m.start()].lower()) else m[0], value
    )
    found = mentions(plain)
    return [m for m in found if m.concept is not None or m.text not in NEUTRAL] or found


def _abbreviates(short: str, long: str) -> bool:
    """Whether `short` is made of letters of `long` in their order, the first of them a word's first."""
    if any(m.concept for m in mentions(short)) or not words(long):
        return False
    starts = [match.start() for match in re.finditer(rf"\b{re.escape(short[0])}", long)]
    return any(re.search(".*?".join(map(re.escape, short)), long[start:]) is not None for start in starts)


def _supported(key: str, value: str) -> frozenset[str]:
    found = mentions(value)
    names = {m.name for m in found} | {m.concept.name for m in found if m.concept}
    allowed = {name for m in found if m.concept for name in m.concept.allows}
    loose = {word for m in found for word in m.text.split() if word not in concepts()}
    return frozenset(names | allowed | loose | set(stems(key)) | {m.name for m in mentions(key)})


def _is_stated(mention: Mention, names: set[str]) -> bool:
    ways = mention.concept.stated_by if mention.concept else ()
    return mention.name in names or any(way <= names for way in ways)


def _count(name: str, found: list[Mention]) -> int:
    """How often a concept is named, by itself or as part of another: the skull in "skull and contents"."""
    return sum(name == m.name or bool(m.concept and name in m.concept.allows) for m in found)


def _is_normal(value: str) -> bool:
    return [m.name for m in mentions(value)] == ["normal"]


def is_same(first: str, second: str) -> bool:
    """Whether two captions are all but the same, by the words and pairs of words that they share."""
    one, two = _shingles(first), _shingles(second)
    return len(one & two) >= SAME * len(one | two)


def _shingles(text: str) -> set[tuple[str, ...]]:
    tokens = [stem(word) for word in words(text)]
    return {*((t,) for t in tokens), *zip(tokens, tokens[1:], strict=False)}
