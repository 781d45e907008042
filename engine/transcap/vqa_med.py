"""VQA-Med-2019's answers as label facts: what the answers about one image say of it, and nothing that they do not.

Knows the set's own words ("xr - plain film") and questions; does not know files or captions.

A question that names the modality ("what is abnormal in the mri?") states it. A "no" states only what it denies:
"is this a ct scan?" answered by no leaves the modality open. "yes" to "is there an abnormality?" names none, so it
states nothing.
"""

import re
from collections.abc import Iterable

Pair = tuple[str, str]
CT, MRI, XRAY = ("modality", "CT"), ("modality", "MRI"), ("modality", "x-ray")
ULTRASOUND, ANGIOGRAM = ("modality", "ultrasound"), ("modality", "angiogram")
GADOLINIUM, NO_CONTRAST = ("technique", "with gadolinium"), ("technique", "without contrast")
INTRAVENOUS, ORAL = ("technique", "with intravenous contrast"), ("technique", "with gastrointestinal contrast")
T1, T2, FLAIR = ("sequence", "T1-weighted"), ("sequence", "T2-weighted"), ("sequence", "FLAIR")
FAT = ("technique", "fat suppressed")
MODALITIES: dict[str, tuple[Pair, ...]] = {
    "xr - plain film": (XRAY,),
    "us - ultrasound": (ULTRASOUND,),
    "us-d - doppler ultrasound": (("modality", "Doppler ultrasound"),),
    "t1": (MRI, T1),
    "t2": (MRI, T2),
    "flair": (MRI, FLAIR),
    "mr - flair": (MRI, FLAIR),
    "mr - flair w/gd": (MRI, FLAIR, GADOLINIUM),
    "mr - t2 weighted": (MRI, T2),
    "mr - t1w - noncontrast": (MRI, T1, NO_CONTRAST),
    "mr - t1w w/gadolinium": (MRI, T1, GADOLINIUM),
    "mr - t1w w/gd (fat suppressed)": (MRI, T1, GADOLINIUM, FAT),
    "mr - dwi diffusion weighted": (MRI, ("sequence", "diffusion-weighted")),
    "mr - other pulse seq.": (MRI,),
    "mr - pdw proton density": (MRI, ("sequence", "proton density")),
    "mr - adc map (app diff coeff)": (MRI, ("sequence", "ADC map")),
    "mr t2* gradient,gre,mpgr,swan,swi": (MRI, ("sequence", "gradient echo")),
    "mr - stir": (MRI, ("sequence", "STIR")),
    "mr - fiesta": (MRI, ("sequence", "FIESTA")),
    "an - angiogram": (ANGIOGRAM,),
    "venogram": (("modality", "venogram"),),
    "mra - mr angiography/venography": (("modality", "MR angiography"),),
    "cta - ct angiography": (("modality", "CT angiography"),),
    "ct - myelogram": (("modality", "CT myelogram"),),
    "ct noncontrast": (CT, NO_CONTRAST),
    "ct with iv contrast": (CT, INTRAVENOUS),
    "ct w/contrast (iv)": (CT, INTRAVENOUS),
    "ct with gi and iv contrast": (CT, ORAL, INTRAVENOUS),
    "ct - gi & iv contrast": (CT, ORAL, INTRAVENOUS),
    "ct with gi contrast": (CT, ORAL),
    "noncontrast": (NO_CONTRAST,),
    "contrast": (("technique", "with contrast"),),
    "iv": (INTRAVENOUS,),
    "gi": (ORAL,),
    "gi and iv": (ORAL, INTRAVENOUS),
    "mammograph": (("modality", "mammogram"),),
    "bas - barium swallow": (("modality", "barium swallow"),),
    "be - barium enema": (("modality", "barium enema"),),
    "ugi - upper gi": (("modality", "upper GI series"),),
    "sbft - small bowel": (("modality", "small bowel series"),),
    "nm - nuclear medicine": (("modality", "nuclear medicine scan"),),
    "pet - positron emission": (("modality", "PET scan"),),
    "pet-ct fusion": (("modality", "PET-CT"),),
}
PLANES = {
    "ap": "anteroposterior",
    "pa": "posteroanterior",
    "mammo - cc": "craniocaudal",
    "mammo - mlo": "mediolateral oblique",
    "mammo - mag cc": "magnified craniocaudal",
    "mammo - xcc": "exaggerated craniocaudal",
    "3d reconstruction": "3D reconstruction",
}
SAID = (  # in a question: what it takes for granted
    (re.compile(r"\bct\b"), CT),
    (re.compile(r"\bmri?\b"), MRI),
    (re.compile(r"\bx-?ray\b"), XRAY),
    (re.compile(r"\bultrasound\b"), ULTRASOUND),
    (re.compile(r"\bangiogram\b"), ANGIOGRAM),
    (re.compile(r"\bmammograph\b"), ("modality", "mammogram")),
    (re.compile(r"\bnuclear medicine\b"), ("modality", "nuclear medicine scan")),
    (re.compile(r"\bpet scan\b"), ("modality", "PET scan")),
)
ASKED = (  # "is this a …?" and "was … given?": what a yes states
    (re.compile(r"\bnoncontrast\b"), (NO_CONTRAST,)),
    (re.compile(r"\bgi contrast\b"), (ORAL,)),
    (re.compile(r"\biv contrast\b"), (INTRAVENOUS,)),
    (re.compile(r"\bwith contrast\b"), (("technique", "with contrast"),)),
    (re.compile(r"\bt1 weighted\b"), (MRI, T1)),
    (re.compile(r"\bt2 weighted\b"), (MRI, T2)),
    (re.compile(r"\bflair\b"), (MRI, FLAIR)),
)
DENIABLE = re.compile(r"\bwith contrast\b")  # answered by no, it states that there is none
ORDER = ("modality", "sequence", "technique", "plane", "organ", "abnormality")


def read_answers(answers: Iterable[tuple[str, str, str]]) -> list[Pair]:
    """Facts out of (category, question, answer) triples about one image, in a fixed order."""
    found: list[Pair] = []
    for category, question, answer in answers:
        question, answer = (" ".join(text.lower().split()) for text in (question, answer))
        if category == "modality":
            found += _modality(question, answer)
        else:
            found += _presumed(question)
            found += _of_category(category, question, answer)
    found = _most_specific(list(dict.fromkeys(found)))
    return sorted(found, key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER))


def _of_category(category: str, question: str, answer: str) -> list[Pair]:
    if category == "plane":
        return [("plane", PLANES.get(answer, answer))]
    if category != "abnormality" or answer not in ("yes", "no"):
        return [(category, answer)]
    asks_normal = "normal" in question.replace("abnormal", "")
    return [("abnormality", "normal")] if (answer == "yes") == asks_normal else []


def _presumed(question: str) -> list[Pair]:
    return [pair for pattern, pair in SAID if pattern.search(question)][:1]


def _modality(question: str, answer: str) -> list[Pair]:
    """What the modality's question and answer state.

    "is this a ct scan?" takes nothing for granted; "is this a noncontrast ct?" neither, unless the answer is yes. A
    yes to "is this a contrast or noncontrast ct?" says nothing.
    """
    asked = [pair for pattern, pairs in ASKED if pattern.search(question) for pair in pairs]
    if answer == "no":
        return [*_presumed(question), NO_CONTRAST] if DENIABLE.search(question) else []
    if answer == "yes":
        return [] if " or " in question else [*_presumed(question), *asked]
    return [*MODALITIES.get(answer, (("modality", answer),)), *_presumed(question)]


def _most_specific(pairs: list[Pair]) -> list[Pair]:
    """Without what a longer fact of the same key says better: CT beside CT angiography, contrast beside intravenous."""

    def is_told_better(pair: Pair) -> bool:
        return any(other[0] == pair[0] and _parts(pair[1]) < _parts(other[1]) for other in pairs)

    return [pair for pair in pairs if not is_told_better(pair)]


def _parts(value: str) -> set[str]:
    return {{"mri": "mr", "angiogram": "angiography"}.get(word, word) for word in re.findall(r"\w+", value.lower())}
