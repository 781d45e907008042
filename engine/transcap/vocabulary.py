"""What a text says: its concepts, whatever words say them, and the words that are none.

Knows the tables of terms; does not know labels, captions or rules.

A concept is one meaning with all its phrases. What a concept `allows` may be said where it is a label, what it is
`stated_by` states it in full: an image labelled "skull and contents" may be called one of the head.
"""

import re
from dataclasses import dataclass
from functools import cache

from miss.engine.transcap import terms

Tokens = tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """One meaning: `kind` names it in a rejection's reason; `phrases` say it."""

    kind: str
    name: str
    phrases: tuple[Tokens, ...]
    allows: frozenset[str] = frozenset()
    stated_by: tuple[frozenset[str], ...] = ()


def words(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation: "T2-weighted" is t2 and weighted, "isn't" is and not."""
    return re.findall(r"[^\W_]+", re.sub(r"['’]s\b", "", re.sub(r"n['’]t\b", " not", text.lower())))


def stem(word: str) -> str:
    """A word without its plural: sinuses -> sinus, vertebrae -> vertebra, opacities -> opacity."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "uses")) and len(word) > 5:
        return word[:-2]
    if word.endswith("ae") and len(word) > 4:
        return word[:-1]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def stems(text: str) -> Tokens:
    return tuple(map(stem, words(text)))


NEUTRAL = frozenset(map(stem, terms.NEUTRAL.split()))
OF_FINDINGS = frozenset(map(stem, terms.OF_FINDINGS.split()))  # where the labels state one that is not "normal"
FINDING_KEYS = terms.FINDING_KEYS
LONGEST = max(len(stems(phrase)) for text in terms.SAME.values() for phrase in text.replace("\n", ",").split(","))


@cache
def concepts() -> dict[str, Concept]:
    """All concepts by name."""
    found = {}
    for kind, lines in terms.SAME.items():
        for line in lines.strip().splitlines():
            phrases = tuple(dict.fromkeys(stems(phrase) for phrase in line.split(",") if phrase.strip()))
            name = " ".join(phrases[0])
            allows, stated = terms.RELATED.get(name, ("", ""))
            ways = tuple(frozenset(way.replace("_", " ") for way in w.split()) for w in stated.split("|") if w)
            allowed = frozenset(a.replace("_", " ") for a in allows.split())
            found[name] = Concept(kind, name, phrases, allowed, ways)
    return found


@cache
def _by_phrase() -> dict[Tokens, Concept]:
    return {phrase: concept for concept in concepts().values() for phrase in concept.phrases}


@dataclass(frozen=True)
class Mention:
    """Words `start` to `end` of a text: a concept, or one word that is none."""

    start: int
    end: int
    text: str
    concept: Concept | None

    @property
    def name(self) -> str:
        return self.concept.name if self.concept else self.text


def mentions(text: str) -> list[Mention]:
    """What a text says, in order: at each place the longest phrase that is known, else the word by itself."""
    tokens, known = stems(text), _by_phrase()
    found, at = [], 0
    while at < len(tokens):
        for end in range(min(len(tokens), at + LONGEST), at, -1):
            concept = known.get(tokens[at:end])
            if concept or end == at + 1:
                found.append(Mention(at, end, " ".join(tokens[at:end]), concept))
                at = end
                break
    return found
