"""Two prompts with worked examples, each as plain text to go on with and as chat messages.

Knows words; does not know any model. A change of a prompt changes its hash, which stands beside every caption.
"""

import hashlib
import json
from dataclasses import dataclass

from miss.engine.transcap.labels import Facts
from miss.engine.transcap.sentences import sentence

Message = dict[str, str]
ORDER = ("plane", "sequence", "modality", "technique", "side", "organ")
MRI, CT, XRAY = ("modality", "MRI"), ("modality", "CT"), ("modality", "x-ray")
EXAMPLES: tuple[tuple[Facts, str], ...] = (
    (
        (MRI, ("sequence", "T2-weighted"), ("plane", "sagittal"), ("organ", "knee"), ("abnormality", "meniscal tear")),
        "This sagittal T2-weighted MRI of the knee demonstrates a meniscal tear.",
    ),
    ((CT, ("organ", "pelvis")), "The pelvis is shown in this CT scan."),
    (
        (CT, ("technique", "with contrast"), ("plane", "axial"), ("organ", "liver"), ("abnormality", "simple cyst")),
        "A simple cyst is seen in this axial CT scan of the liver with contrast.",
    ),
    (
        (XRAY, ("plane", "lateral"), ("organ", "shoulder"), ("abnormality", "calcific tendinitis")),
        "Calcific tendinitis is visible on a lateral radiograph of the shoulder.",
    ),
    ((("modality", "ultrasound"), ("organ", "thyroid")), "Ultrasound view in which the thyroid is seen."),
    (
        (CT, ("technique", "without contrast"), ("plane", "coronal"), ("organ", "sinuses"), ("abnormality", "polyp")),
        "Coronal CT of the sinuses without contrast, in which a polyp is present.",
    ),
    ((("modality", "mammogram"), ("organ", "breast")), "The breast is visible in this mammogram."),
)
NOTHING_ELSE = (
    "Add nothing: no other organ, finding, side, modality, plane, age, sex or cause, and no guess. One short sentence."
)


@dataclass(frozen=True)
class Prompt:
    """`rules`: what is wanted, in words. `given`, `wanted`: what an example's two parts are called.

    labels: the labels as a list, from which a caption is to be written. rewrite: the labels as a plain sentence, which
    is to be said in other words: a small model leaves less out of a sentence than of a list.
    """

    name: str
    rules: str
    given: str
    wanted: str
    examples: tuple[tuple[Facts, str], ...] = EXAMPLES

    @property
    def hash(self) -> str:
        """Of every word that a model reads before a label set."""
        return hashlib.sha256(json.dumps([self.name, self.messages(())[:-1], self.text(())]).encode()).hexdigest()[:16]

    def ask(self, facts: Facts) -> str:
        """A label set as this prompt puts it."""
        if not facts:
            return ""
        return sentence(facts) if self.name == "rewrite" else list_facts(facts)

    def text(self, facts: Facts) -> str:
        """For a model that goes on with a text."""
        done = "".join(f"{self.given}: {self.ask(f)}\n{self.wanted}: {caption}\n\n" for f, caption in self.examples)
        return f"{self.rules}\n\n{done}{self.given}: {self.ask(facts)}\n{self.wanted}:"

    def messages(self, facts: Facts) -> list[Message]:
        """For a model that takes turns."""
        talk = [{"role": "system", "content": self.rules}]
        for given, caption in self.examples:
            talk += [{"role": "user", "content": self.ask(given)}, {"role": "assistant", "content": caption}]
        return [*talk, {"role": "user", "content": self.ask(facts)}]


def list_facts(facts: Facts) -> str:
    """Labels in the order in which a sentence says them: a small model that copies in order leaves less out."""
    facts = tuple(sorted(facts, key=lambda fact: ORDER.index(fact[0]) if fact[0] in ORDER else len(ORDER)))
    return "; ".join(f"{key}: {value}" for key, value in facts)


PROMPTS = {
    "labels": Prompt(
        "labels",
        f"You write a caption for a medical image from its labels. Mention every label. {NOTHING_ELSE}",
        "Labels",
        "Caption",
    ),
    "rewrite": Prompt(
        "rewrite",
        f"You say a caption of a medical image in other words. Leave nothing out. {NOTHING_ELSE}",
        "Caption",
        "In other words",
    ),
}


def get_prompt(name: str) -> Prompt:
    """The prompt of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROMPTS:
        raise ValueError(f"--prompt: got {name!r}; accepted: {', '.join(PROMPTS)}")
    return PROMPTS[name]
