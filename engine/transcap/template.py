"""Captions from sentence frames: the baseline, and what fills up where a language model's captions were all rejected.

Knows how label facts are said in English; does not know files, cleaning or language models.
"""

import random
from collections.abc import Iterator, Sequence

from miss.engine.transcap.labels import Facts, LabelSet
from miss.engine.transcap.vocabulary import FINDING_KEYS
from miss.engine.transcap.writer import Candidate, Written, number

VERSION = "1"
IMAGES = {  # what a modality's image may be called; each must mean the same to the cleaner
    "ct": ("CT", "CT scan", "CT image", "computed tomography scan"),
    "mri": ("MRI", "MR image", "MRI scan", "magnetic resonance image"),
    "x-ray": ("x-ray", "radiograph", "x-ray image", "plain film"),
    "ultrasound": ("ultrasound image", "ultrasound scan", "sonogram"),
    "angiogram": ("angiogram", "angiographic image"),
    "mammogram": ("mammogram", "mammographic image"),
    "pet scan": ("PET scan", "PET image"),
}
ORGANS = {
    "skull and contents": ("the skull and its contents", "the head"),
    "spine and contents": ("the spine and its contents", "the spine"),
    "lung, mediastinum, pleura": ("the lung, mediastinum and pleura", "the chest"),
    "face, sinuses, and neck": ("the face, sinuses and neck",),
    "heart and great vessels": ("the heart and great vessels",),
    "vascular and lymphatic": ("the vascular and lymphatic system",),
    "gastrointestinal": ("the gastrointestinal system", "the digestive system"),
    "genitourinary": ("the genitourinary system", "the urogenital system"),
    "musculoskeletal": ("the musculoskeletal system",),
}
BEFORE, AFTER, PLACE = ("plane", "sequence"), ("technique", "contrast"), ("organ", "body part", "region", "location")
# {image}: "axial CT scan"; {of}: " of the chest" or nothing; {finding}: " showing …" or nothing; {more}: what is left.
FRAMES = (
    "{image}{of}{after}{finding}{more}.",
    "This is {a_image}{of}{after}{finding}{more}.",
    "{A_image}{of}{after} is shown{finding}{more}.",
    "The image is {a_image}{of}{after}{finding}{more}.",
    "Shown here is {a_image}{of}{after}{finding}{more}.",
    "{A_image}{of}{after}{finding}{more}, as taken for a medical study.",
    "Seen here is {a_image}{of}{after}{finding}{more}.",
    "View{of} in {a_image}{after}{finding}{more}.",
    "Picture taken as {a_image}{of}{after}{finding}{more}.",
    "A patient is imaged by {a_image}{of}{after}{finding}{more}.",
    "Medical image, {a_image}{of}{after}{finding}{more}.",
    "From a radiological examination: {a_image}{of}{after}{finding}{more}.",
    "Here we see {a_image}{of}{after}{finding}{more}.",
    "{A_image}{after}{finding}{more}, a view{of}.",
)
FINDINGS = (" showing {}", " with {}", " demonstrating {}", " in which {} is seen", ", the finding being {}")
NORMAL = (" with normal findings", " with a normal appearance", " showing no abnormality")


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


def captions(facts: Facts, wanted: int, seed: int) -> list[str]:
    """Up to `wanted` different captions, every frame once before any comes again."""
    draw, found = random.Random(seed), dict[str, None]()
    for frame in _frames(draw, wanted):
        parts = {"image": _image(facts, draw), "of": _place(facts, draw), "after": _after(facts)}
        parts |= {"finding": _finding(facts, draw), "more": _more(facts)}
        if "{of}" in frame and not parts["of"] and frame.startswith("View") or ", a view{of}" in frame and not parts["of"]:
            continue
        article = "an" if parts["image"][:1].lower() in "aeiou" or parts["image"].startswith(("MR", "x-")) else "a"
        parts["a_image"] = f"{article} {parts['image']}"
        text = frame.format(**parts, A_image=_capital(parts["a_image"]))
        found.setdefault(_capital(text))
        if len(found) == wanted:
            break
    return list(found)


def _frames(draw: random.Random, wanted: int) -> Iterator[str]:
    for _ in range(2 + 4 * wanted // len(FRAMES)):
        yield from draw.sample(FRAMES, len(FRAMES))


def _values(facts: Facts, keys: tuple[str, ...] | frozenset[str]) -> list[str]:
    return [value for key, value in facts if key in keys]


def _image(facts: Facts, draw: random.Random) -> str:
    """ "axial T2-weighted MRI scan"; "medical image" where no modality is known."""
    modalities = _values(facts, ("modality",))
    called = [draw.choice(IMAGES.get(m.lower(), (m, f"{m} image") if m.split()[-1] != "scan" else (m,))) for m in modalities]
    return " ".join([*_values(facts, ("plane",)), *_values(facts, ("sequence",)), " and ".join(called) or "medical image"])


def _place(facts: Facts, draw: random.Random) -> str:
    places = [draw.choice(ORGANS.get(o.lower(), (f"the {o}",))) for o in _values(facts, PLACE)]
    sides = [f" on the {side} side" for side in _values(facts, ("side", "laterality"))]
    return (" of " + " and ".join(places) if places else "") + "".join(sides)


def _after(facts: Facts) -> str:
    said = [v if v.lower().startswith(("with", "without")) else f"with {v}" for v in _values(facts, AFTER)]
    return "".join(f" {text}" for text in said)


def _finding(facts: Facts, draw: random.Random) -> str:
    values = _values(facts, FINDING_KEYS)
    if [v.lower() for v in values] == ["normal"]:
        return draw.choice(NORMAL)
    return draw.choice(FINDINGS).format(" and ".join(values)) if values else ""


def _more(facts: Facts) -> str:
    told = {"modality", *BEFORE, *AFTER, *PLACE, "side", "laterality", *FINDING_KEYS}
    return "".join(f", {key} {value}" for key, value in facts if key not in told)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
