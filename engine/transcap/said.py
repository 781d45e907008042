"""What several answers about one image state together: each thing once, nothing that they contradict.

Knows stated and denied facts; does not know questions, data sets or captions.
"""

import re

from miss.engine.transcap.vocabulary import mentions

Pair = tuple[str, str]
MOST_DENIED = 3  # of findings: a caption that denies ten things states little of its image


class Said:
    """What the rows of an image stated so far, in their order, and what they denied."""

    def __init__(self) -> None:
        self._stated: dict[Pair, None] = {}
        self._denied: dict[Pair, None] = {}

    def add(self, key: str, value: str | None) -> None:
        if value:
            self._stated.setdefault((key, value))

    def answer(self, key: str, value: str, yes: bool) -> None:
        (self._stated if yes else self._denied).setdefault((key, value))

    def facts(self) -> list[Pair]:
        """In a fixed order; of modality, sequence and plane none where rows disagree."""
        found: list[Pair] = []
        for key in ("modality", "sequence", "plane", "organ"):
            values = self._of(key)
            found += [(key, value) for value in values[:1] if len(values) == 1]
        found += self._findings(found)
        whole = {value for _, value in found}
        inside = [value for value in self._of("inside") if value not in whole]
        if inside:
            found.append(("containing", _listed(inside, "and")))
        outside = self._denials("inside", found)
        if outside:
            found.append(("containing", f"no {_listed(outside, 'or')}"))
        return found

    def _of(self, key: str) -> list[str]:
        return [v for k, v in self._stated if k == key and (k, v) not in self._denied]

    def _denials(self, key: str, found: list[Pair]) -> list[str]:
        """What is denied, without what names a thing that is stated: beside "abdomen", "no abdominal hernia" is too
        fine a line for a caption."""
        stated = {mention.name for _, value in found for mention in mentions(value)}
        denied = [v for k, v in self._denied if k == key and (k, v) not in self._stated]
        return [v for v in denied if not stated & {mention.name for mention in mentions(v)}]

    def _findings(self, found: list[Pair]) -> list[Pair]:
        """Without what another says better; that all is normal only where nothing is found."""
        stated = [v for v in self._of("finding") if v != "normal"]
        stated = [v for v in stated if not any(_telling(v) < _telling(other) for other in stated)]
        stated = [v for v in stated if not {_opposite(v)} & set(stated)]
        abnormal = [v for v in stated if v != "no disease" and not v.startswith("normal ")]
        if not abnormal and ("finding", "normal") in self._stated.keys() - self._denied.keys():
            return [("finding", "normal")]
        kept = abnormal + [v for v in stated if v.startswith("normal ")]
        kept += ["no disease"] if not abnormal and "no disease" in stated else []
        facts = [("finding", value) for value in kept]
        denied = [v for v in self._denials("finding", found + facts) if v != "normal"]
        return facts + [("finding", f"no {v}") for v in denied[:MOST_DENIED]]


def _opposite(value: str) -> str:
    """Of "normal lung", "abnormal lung", and the other way; of anything else nothing."""
    if value.startswith("normal "):
        return f"ab{value}"
    return value.removeprefix("ab") if value.startswith("abnormal ") else ""


def word_set(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def _telling(text: str) -> set[str]:
    """ "Abnormality in left lung" says nothing beside "nodule in left lung"."""
    return word_set(text) - {"abnormality", "abnormalities"}


def _listed(values: list[str], word: str) -> str:
    return f" {word} ".join(filter(None, (", ".join(values[:-1]), values[-1])))
