"""Sentences from frames: how label facts are said in English.

Knows frames and words; does not know writers, cleaning or files.
"""

import random
from collections.abc import Iterator
from typing import Any

from miss.engine.transcap.labels import Facts
from miss.engine.transcap.vocabulary import FINDING_KEYS

VERSION = "1"  # of the frames and words: a change of them is another writer
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
VIEW, A_VIEW = "View{of} in {a_image}{after}{finding}{more}.", "{A_image}{after}{finding}{more}, a view{of}."
FRAMES = (
    "{image}{of}{after}{finding}{more}.",
    "This is {a_image}{of}{after}{finding}{more}.",
    "{A_image}{of}{after} is shown{finding}{more}.",
    "The image is {a_image}{of}{after}{finding}{more}.",
    "Shown here is {a_image}{of}{after}{finding}{more}.",
    "{A_image}{of}{after}{finding}{more}, as taken for a medical study.",
    "Seen here is {a_image}{of}{after}{finding}{more}.",
    VIEW,
    "Picture taken as {a_image}{of}{after}{finding}{more}.",
    "A patient is imaged by {a_image}{of}{after}{finding}{more}.",
    "Medical image, {a_image}{of}{after}{finding}{more}.",
    "From a radiological examination: {a_image}{of}{after}{finding}{more}.",
    "Here we see {a_image}{of}{after}{finding}{more}.",
    A_VIEW,
)
FINDINGS = (" showing {}", " with {}", " demonstrating {}", " in which {} is seen", ", the finding being {}")
NORMAL = (" with normal findings", " with a normal appearance", " showing no abnormality")


def captions(facts: Facts, wanted: int, seed: int) -> list[str]:
    """Up to `wanted` different captions, every frame once before any comes again."""
    draw, found = random.Random(seed), dict[str, None]()
    for frame in _frames(draw, wanted):
        text = _fill(frame, facts, draw)
        if text is not None:
            found.setdefault(text)
        if len(found) == wanted:
            break
    return list(found)


def sentence(facts: Facts) -> str:
    """The plainest caption: always the same."""
    text = _fill(FRAMES[0], facts, FIRST)
    assert text is not None
    return text


class _First(random.Random):
    """Draws whatever comes first."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


FIRST = _First()


def _fill(frame: str, facts: Facts, draw: random.Random) -> str | None:
    """A frame with its parts; None where it needs a place and the labels have none."""
    image, place = _image(facts, draw), _place(facts, draw)
    if not place and frame in (VIEW, A_VIEW):
        return None
    article = "an" if image[:1].lower() in "aeiou" or image.startswith(("MR", "x-")) else "a"
    parts = {"image": image, "a_image": f"{article} {image}", "A_image": _capital(f"{article} {image}"), "of": place}
    parts |= {"after": _after(facts), "finding": _finding(facts, draw), "more": _more(facts)}
    return _capital(frame.format(**parts))


def _frames(draw: random.Random, wanted: int) -> Iterator[str]:
    for _ in range(2 + 4 * wanted // len(FRAMES)):
        yield from draw.sample(FRAMES, len(FRAMES))


def _values(facts: Facts, keys: tuple[str, ...] | frozenset[str]) -> list[str]:
    return [value for key, value in facts if key in keys]


def _image(facts: Facts, draw: random.Random) -> str:
    """ "axial T2-weighted MRI scan"; "medical image" where no modality is known."""
    modalities = _values(facts, ("modality",))
    called = [
        draw.choice(IMAGES.get(m.lower(), (m, f"{m} image") if m.split()[-1] != "scan" else (m,))) for m in modalities
    ]
    return " ".join(
        [*_values(facts, ("plane",)), *_values(facts, ("sequence",)), " and ".join(called) or "medical image"]
    )


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
