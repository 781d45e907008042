"""SLAKE's and VQA-RAD's questions and answers as label facts: what the answers about one image say of it.

Knows the two sets' fields, words and ways to ask; does not know files, captions or writers.

Said are modality, sequence, plane, part of the body, what is in the picture and what is not, findings and where they
are. Sizes, colours, counts, shapes, places of organs and general knowledge are left alone: their answers need the
question beside them. What answers contradict (paraphrases do) is said neither way.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from miss.engine.data.datasets import is_validation_image
from miss.engine.transcap.said import Pair, Said, word_set
from miss.engine.transcap.vocabulary import mentions

Row = Mapping[str, Any]
MODALITIES = {"ct": "CT", "mri": "MRI", "x-ray": "x-ray"}
SLAKE_ORGANS = {
    "abdomen": "abdomen",
    "lung": "chest",
    "chest_lung": "chest",
    "chest_heart": "chest",
    "chest_mediastinal": "chest",
    "brain": "brain",
    "brain_tissue": "brain",
    "brain_face": "head",
    "pelvic cavity": "pelvic cavity",
    "neck": "neck",
}
RAD_ORGANS = {"head": "head", "chest": "chest", "abd": "abdomen"}
RAD_MODALITIES = (
    (re.compile(r"\b(mri|mr|t1|t2|flair|dwi)\b"), "MRI"),
    (re.compile(r"\b(ct|cat scan|computed tomography)\b"), "CT"),
    (re.compile(r"\b(x-?ray|x ray|xr|plain film|radiograph)\b"), "x-ray"),
    (re.compile(r"\bultrasound\b"), "ultrasound"),
)
SEQUENCES = (
    (re.compile(r"\bt1\b"), "T1-weighted"),
    (re.compile(r"\bt2\b"), "T2-weighted"),
    (re.compile(r"\bflair\b"), "FLAIR"),
    (re.compile(r"\b(dwi|diffusion)\b"), "diffusion-weighted"),
)
PLANES = (
    (re.compile(r"\baxial\b"), "axial"),
    (re.compile(r"\btransverse\b"), "transverse"),
    (re.compile(r"\bcoronal\b"), "coronal"),
    (re.compile(r"\bsagittal\b"), "sagittal"),
    (re.compile(r"\b(pa|posterior.?anterior)\b"), "posteroanterior"),
    (re.compile(r"\b(ap|anterior.?posterior)\b"), "anteroposterior"),
    (re.compile(r"\blateral\b"), "lateral"),
)
NOUN = r"(?P<what>[a-z' -]+?)"
SHOWN = (
    r"(?: present| seen| visible| noted| identified| pictured| shown)?"
    r"(?: (?:in|on) (?:the|this) (?:image|picture|scan|film|ct|mri))?"
)
CONTAINED = (
    re.compile(rf"does the (?:picture|image) contain (?:the )?{NOUN}"),
    re.compile(rf"do(?:es)? (?:the )?{NOUN} (?:appear|exist) in (?:the|this) (?:image|picture)"),
    re.compile(rf"(?:is|are|are/is|is/are) there (?:a |an )?{NOUN} in (?:the|this) (?:image|picture)"),
)
THERE = (
    re.compile(
        rf"(?:is|are|is/are) there (?:any |an |a )?(?:evidence of |signs? of )?(?:any |an |a )?{NOUN}{SHOWN}",
    ),
    re.compile(rf"(?:is|are) (?:a |an ){NOUN} (?:present|seen|visible)"),
)
HEALTHY = re.compile(
    rf"(?:is|are|does|do|is/are) the {NOUN} (?:look )?(?P<how>healthy|normal|abnormal|unhealthy)"
    r"(?: appearing| looking)?(?: (?:in|on) (?:the|this) (?:image|picture|scan|film))?"
)
IMAGE_NORMAL = re.compile(r"(?:is|does) this (?:image|ct|mri|x-?ray|scan)?\s*(?:look )?(?:a )?normal(?: image)?")
WHICH_ABNORMAL = re.compile(r"which organ is abnormal, .*")
DISEASES = re.compile(
    r"what (?:diseases?|abnormalit(?:y|ies)) (?:are|is|is/are) (?:included|shown|there) in (?:the|this) .*"
)
WHAT_FINDING = re.compile(
    r"what (?:is|is/are|are) (?:the )?(?:primary |secondary )?(?:abnormal|pathology|abnormality|abnormalities|finding)"
    r"(?: (?:in|on|seen|near/in) .*)?"
)
WHERE = re.compile(
    r"(?:where (?:is|are|is/are)|what is the location of) (?:the )?"
    r"(?P<what>abnormalit(?:y|ies)|mass(?:es)?|lesions?|nodules?|infarcts?|hemorrhage|pneumothorax)"
    r"(?: located)?(?: in this (?:image|picture))?"
)
DIRECTION = re.compile(
    r"(?:in|at|on|within|near|above|below|anterior|posterior|adjacent|underneath|around|throughout)\b"
)
YES, NO = ("yes",), ("no",)
MOST_ANSWER_WORDS, MOST_PLACE_WORDS, MOST_NAMED_WORDS = 10, 6, 3
CORRECTIONS = {"brian": "brain", "lungs": "lung", "kidneys": "kidney", "eyes": "eye"}


def is_slake(row: Row) -> bool:
    return "img_name" in row and "q_lang" in row


def is_rad(row: Row) -> bool:
    return "image_name" in row and "image_organ" in row


def set_aside(row: Row, split: str) -> str | None:
    """Why a row is not read, None where it is: another language, or VQA-RAD's tenth of images for validation."""
    if is_slake(row) and row["q_lang"] != "en":
        return f"SLAKE's rows in {'Chinese' if row['q_lang'] == 'zh' else row['q_lang']}"
    if is_rad(row) and split != "all" and is_validation_image(str(row["image_name"])) != (split == "validate"):
        return "VQA-RAD's rows of " + ("training images" if split == "validate" else "validation images")
    return None


def slake_facts(rows: Iterable[Row]) -> list[Pair]:
    """What SLAKE's rows about one image state."""
    said = Said()
    for row in rows:
        question, answer = _texts(row)
        said.add("modality", MODALITIES.get(str(row.get("modality", "")).strip().lower()))
        said.add("organ", SLAKE_ORGANS.get(str(row.get("location", "")).strip().lower()))
        kind = str(row.get("content_type", "")).lower()
        if kind == "modality":
            _sequence(said, question, answer)
        elif kind == "plane":
            _plane(said, question, answer)
        elif kind == "organ":
            _contained(said, question, answer)
        elif kind in ("abnormality", "position"):
            _finding(said, question, answer)
    return said.facts()


def rad_facts(rows: Iterable[Row]) -> list[Pair]:
    """What VQA-RAD's rows about one image state."""
    said = Said()
    for row in rows:
        question, answer = _texts(row)
        said.add("organ", RAD_ORGANS.get(str(row.get("image_organ", "")).strip().lower()))
        kinds = {kind.strip().lower() for kind in str(row.get("question_type", "")).split(",")}
        if kinds & {"modality"}:
            _rad_modality(said, question, answer)
            _sequence(said, question, answer)
        if kinds & {"plane"}:
            _plane(said, question, answer)
        if kinds & {"abn", "pres", "pos"}:
            _finding(said, question, answer)
    return said.facts()


def _texts(row: Row) -> tuple[str, str]:
    question, answer = (" ".join(str(row.get(key, "")).lower().split()) for key in ("question", "answer"))
    question = re.sub(r"\s*-+\s*yes/no$", "", question.strip(" ?.")).strip(" ?.")
    return " ".join(CORRECTIONS.get(word, word) for word in question.split()), answer.strip(" .")


def _first(table: Iterable[tuple[re.Pattern[str], str]], text: str) -> str | None:
    return next((value for pattern, value in table if pattern.search(text)), None)


def _first_match(patterns: Iterable[re.Pattern[str]], text: str) -> re.Match[str] | None:
    return next((match for pattern in patterns if (match := pattern.fullmatch(text))), None)


def _told(question: str, answer: str) -> str:
    """The text that states something: the question where the answer is yes, nothing where it is no, else the answer."""
    if answer in (*YES, *NO):
        return question if answer in YES and " or " not in question else ""
    return answer


def _rad_modality(said: Said, question: str, answer: str) -> None:
    if " not " not in f" {question} ":
        said.add("modality", _first(RAD_MODALITIES, _told(question, answer)))


def _sequence(said: Said, question: str, answer: str) -> None:
    if " not " not in f" {question} ":
        said.add("sequence", _first(SEQUENCES, _told(question, answer)))


def _plane(said: Said, question: str, answer: str) -> None:
    if answer in (*YES, *NO) and not re.match(r"(?:is|was) (?:this|the plane|it)\b", question):
        return
    said.add("plane", _first(PLANES, _told(question, answer)))


def _contained(said: Said, question: str, answer: str) -> None:
    match = _first_match(CONTAINED, question)
    if match and answer in (*YES, *NO) and _is_named(match["what"]):
        said.answer("inside", match["what"], answer in YES)


def _finding(said: Said, question: str, answer: str) -> None:
    short = 0 < len(answer.split()) <= MOST_ANSWER_WORDS
    if answer in (*YES, *NO):
        _closed_finding(said, question, answer in YES)
    elif DISEASES.fullmatch(question) or WHAT_FINDING.fullmatch(question):
        if answer in ("none", "nothing", "no abnormality"):
            said.add("finding", "no disease")
        elif short:
            said.add("finding", answer)
    elif WHICH_ABNORMAL.fullmatch(question):
        named = question.removeprefix("which organ is abnormal, ").split(" or ") if answer == "both" else [answer]
        for organ in named:
            said.add("finding", f"abnormal {organ.strip()}" if _is_named(organ.strip()) else None)
    elif (match := WHERE.fullmatch(question)) and _is_place(answer):
        said.add("finding", f"{match['what']} {answer if DIRECTION.match(answer) else f'in {answer}'}")


def _closed_finding(said: Said, question: str, yes: bool) -> None:
    if IMAGE_NORMAL.fullmatch(question):
        said.answer("finding", "normal", yes)
    elif match := HEALTHY.fullmatch(question):
        well = (match["how"] in ("healthy", "normal")) == yes
        if _is_named(match["what"]):
            said.add("finding", f"{'normal' if well else 'abnormal'} {match['what']}")
    elif (match := _first_match(THERE, question)) and _is_named(what := match["what"]):
        is_organ = all(m.concept is not None and m.concept.kind == "organ" for m in mentions(what))
        said.answer("inside" if is_organ else "finding", what, yes)


def _is_place(answer: str) -> bool:
    """Whether it says where by itself: "left lung", not "right", which needs the side of something."""
    words = word_set(answer) - {
        "in",
        "on",
        "the",
        "both",
        "left",
        "right",
        "upper",
        "lower",
        "center",
        "bilateral",
        "bilaterally",
    }
    return bool(words - {"diffuse", "top", "bottom", "side", "sides"}) and len(answer.split()) <= MOST_PLACE_WORDS


def _is_named(what: str) -> bool:
    """Whether it is a thing by its name, not a clause: "pleural effusion", not "air under the diaphragm"."""
    words = what.split()
    vague = {"abnormality", "abnormalities", "image", "patient", "anything", "more", "other", "the", "this", "both"}
    vague |= {"finding", "findings", "not", "it", "they", "lesser", "greater"}
    return 0 < len(words) <= MOST_NAMED_WORDS and not vague & set(words) and "patient's" not in words
