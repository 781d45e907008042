"""When an answer counts as right: one normaliser, and three named protocols that score a prediction against the truth.

Knows strings; does not know models, images, files or statistics.

The normaliser, in this order until nothing changes (golden tests in tests/engine/test_protocols.py):
 1. Unicode NFKC, lower case, curly apostrophes made straight;
 2. clitics joined ("isn't", "isn ' t" -> "isnt"); spaces closed inside decimals ("6. 5" -> "6.5"), before "%";
 3. thousands commas dropped ("1,000" -> "1000"); every other punctuation character (Unicode categories P*, and `~^|)
    becomes a space, except "%" and a point before a digit and not after a letter: "X-Ray" -> "x ray"; < > + = stay;
 4. number words zero … ninety-nine to digits, "none" to 0 (VQA's convention);
 5. the articles a, an, the are dropped;
 6. a whole answer that is a variant of yes or no becomes "yes" or "no" ("Yes, it is." -> "yes"; "nope" and
    "No, it isn't" -> "no"); a longer answer that only begins with yes or no stays as it is.
Text that consists of punctuation or articles alone keeps its step-1 form, so that "?" and "." never match each other.

Protocols:
 exact_match  right where the normalised strings are equal; open and closed as the data set's `answer_type` says (where
              it says nothing: closed when the truth normalises to yes or no). The headline.
 original     the rule of MISS's own script: a row is closed when the truth is literally one of yes, Yes, No, no, and
              right when the prediction is literally of the same class; joined by qid, not by position. That script
              scores nothing else: open rows are scored here by exact_match, for want of a rule.
 llava_med    open: recall of the truth's tokens in the prediction, token F1 and sentence BLEU-1; closed: the truth
              stands in the prediction as whole words (and, where it is yes or no, the opposite word does not).
              Deviations from LLaVA-Med's script, on purpose: this normaliser; repeated tokens are clipped (there a
              prediction that repeats a right word gains recall); whole words (there "no" is found in "normal"); and
              wrong closed rows stay in the denominator.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from math import exp
from typing import Literal

AnswerType = Literal["open", "closed"]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_NUMBERS = {word: i for i, word in enumerate((_UNITS + " eighteen nineteen").split())} | {"none": 0}
_TENS = {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_ARTICLES = frozenset(("a", "an", "the"))
_YES_NO = {word: "yes" for word in "yes y yeah yep yup true".split()} | {w: "no" for w in "no n nope nah false".split()}
_SUBJECT = r"(?:it|there|they|this|that|these|those|he|she)"
_VERB = r"(?:is|are|was|were|does|do|did|has|have|can|could)"
_CLAUSE = re.compile(rf"(yes) {_SUBJECT} {_VERB}|(no) {_SUBJECT} {_VERB}(?:nt| not)")
_CLITIC = re.compile(r"(?<=\w)\s?'\s?(?=(?:s|t|d|m|re|ve|ll)\b)")
_DECIMAL = re.compile(r"(?<=\d)\s*\.\s*(?=\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_POINT = re.compile(r"(?<![^\W\d_])\.(?=\d)")
_CJK = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])")
_CURLY = str.maketrans("\u2018\u2019\u02bc", "'''")


def normalise(text: str) -> str:
    """The one normaliser: see the head of this file. Normalising twice changes nothing."""
    # One pass can bring up what another takes away ("0:.0" -> "0 .0" -> "0.0"): until nothing changes.
    while (once := _normalise_once(text)) != text:
        text = once
    return text


def _normalise_once(text: str) -> str:
    text = _fold(text)
    return _words(_strip_punctuation(_join(text))) or text


def _fold(text: str) -> str:
    # Lower-casing can undo NFKC (dotted capital I), and NFKC can bring capitals up: until nothing changes.
    while (folded := unicodedata.normalize("NFKC", text.translate(_CURLY)).lower()) != text:
        text = folded
    return " ".join(text.split())


def _join(text: str) -> str:
    text = _DECIMAL.sub(".", _CLITIC.sub("", text))
    return _THOUSANDS.sub("", re.sub(r"\s+%", "%", text))


def _strip_punctuation(text: str) -> str:
    points = {m.start() for m in _POINT.finditer(text)}
    return "".join(
        " " if i not in points and c != "%" and (c in "`~^|" or unicodedata.category(c)[0] == "P") else c
        for i, c in enumerate(text)
    )


def _words(text: str) -> str:
    words: list[str] = []
    tens = False
    for word in text.split():
        if tens and 0 < _NUMBERS.get(word, 0) < 10:
            words[-1] = str(int(words[-1]) + _NUMBERS[word])
            tens = False
            continue
        tens = word in _TENS
        number = _TENS.get(word, _NUMBERS.get(word))
        if number is not None:
            words.append(str(number))
        elif word not in _ARTICLES:
            words.append(word)
    joined = " ".join(words)
    clause = _CLAUSE.fullmatch(joined)
    return _YES_NO.get((clause[1] or clause[2]) if clause else joined, joined)


def tokens(text: str) -> list[str]:
    """The normalised words; a Chinese, Japanese or Korean character is a word of its own."""
    return _CJK.sub(r" \1 ", normalise(text)).split()


def answer_type(given: str | None, answer: str) -> AnswerType:
    """The data set's own answer type; where it has none, closed means that the truth normalises to yes or no."""
    if given in ("open", "closed"):
        return "open" if given == "open" else "closed"
    return "closed" if normalise(answer) in ("yes", "no") else "open"


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after the normaliser."""
    return normalise(prediction) == normalise(answer)


def literal_yes_no(text: str) -> Literal["yes", "no"] | None:
    """MISS's class of an answer: yes for literally yes or Yes, no for literally no or No, otherwise None."""
    if text in ("yes", "Yes"):
        return "yes"
    return "no" if text in ("no", "No") else None


def token_recall_f1(prediction: str, answer: str) -> tuple[float, float]:
    """Recall and F1 of tokens as multisets: overlap = sum of min counts; recall = overlap / tokens of the answer."""
    ours, truth = tokens(prediction), tokens(answer)
    overlap = sum((Counter(ours) & Counter(truth)).values())
    if not overlap:
        return 0.0, 0.0
    return overlap / len(truth), 2 * overlap / (len(ours) + len(truth))


def bleu1(prediction: str, answer: str) -> float:
    """Sentence BLEU-1: clipped unigram precision times the brevity penalty min(1, exp(1 - len(truth) / len(ours)))."""
    ours, truth = tokens(prediction), tokens(answer)
    overlap = sum((Counter(ours) & Counter(truth)).values())
    if not overlap:
        return 0.0
    return overlap / len(ours) * min(1.0, exp(1 - len(truth) / len(ours)))


def contains(prediction: str, answer: str) -> bool:
    """The answer's tokens stand in the prediction as one run; yes and no must not stand there both."""
    ours, truth = tokens(prediction), tokens(answer)
    if truth in (["yes"], ["no"]) and {"yes", "no"} <= set(ours):
        return False
    return any(ours[i : i + len(truth)] == truth for i in range(len(ours) - len(truth) + 1))


@dataclass(frozen=True)
class Verdict:
    """One row under every protocol. `literal_class` is the original's class of the truth, None for its open rows."""

    answer_type: AnswerType
    exact: bool
    strict: bool
    literal_class: Literal["yes", "no"] | None
    original: bool
    recall: float
    f1: float
    bleu1: float
    contains: bool


def judge(prediction: str, answer: str, given_type: str | None = None) -> Verdict:
    """Scores one prediction against its truth. `strict` is equality of the raw strings, outer spaces aside."""
    exact = exact_match(prediction, answer)
    literal = literal_yes_no(answer)
    recall, f1 = token_recall_f1(prediction, answer)
    return Verdict(
        answer_type=answer_type(given_type, answer),
        exact=exact,
        strict=prediction.strip() == answer.strip(),
        literal_class=literal,
        original=exact if literal is None else literal_yes_no(prediction) == literal,
        recall=recall,
        f1=f1,
        bleu1=bleu1(prediction, answer),
        contains=contains(prediction, answer),
    )
