"""Two prompts with worked examples, each as plain text to go on with and as chat messages.

Knows words; does not know any model. A change of a prompt changes its hash, which stands beside every caption.
"""

import hashlib
import json
from dataclasses import dataclass

from miss.engine.transcap.labels import Facts

Message = dict[str, str]
EXAMPLES: tuple[tuple[Facts, str], ...] = (
    (
        (("modality", "ultrasound"), ("organ", "liver"), ("abnormality", "simple cyst")),
        "An ultrasound image of the liver showing a simple cyst.",
    ),
    ((("modality", "x-ray"), ("plane", "lateral"), ("organ", "knee")), "This lateral radiograph displays the knee."),
    (
        (("modality", "MRI"), ("sequence", "T2-weighted"), ("organ", "shoulder"), ("abnormality", "tendon tear")),
        "A tendon tear is seen on this T2-weighted MRI of the shoulder.",
    ),
    ((("modality", "CT"), ("organ", "pelvis")), "The pelvis is shown in this CT scan."),
    (
        (("modality", "CT"), ("technique", "without contrast"), ("plane", "coronal"), ("organ", "sinuses")),
        "Coronal CT of the sinuses, taken without contrast.",
    ),
    ((("modality", "mammogram"), ("organ", "breast")), "Mammogram in which the breast is visible."),
)
RULES = (
    "You write one short caption for a medical image from its labels. Mention every label. Add nothing that the labels "
    "do not say: no other organ, finding, side, modality, plane, age, sex or cause, and no guess. One sentence."
)


@dataclass(frozen=True)
class Prompt:
    """`examples`: worked examples and nothing else. `rules`: what is wanted in words, then the examples as a talk."""

    name: str
    rules: str
    examples: tuple[tuple[Facts, str], ...] = EXAMPLES

    @property
    def hash(self) -> str:
        content = json.dumps([self.name, self.rules, self.examples, list_facts((("key", "value"),))])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def start(self) -> str:
        """What comes before every label set, for a model that goes on with a text."""
        return "".join(f"Labels: {list_facts(facts)}\nCaption: {caption}\n\n" for facts, caption in self.examples)

    def text(self, facts: Facts) -> str:
        return f"{self.start}Labels: {list_facts(facts)}\nCaption:"

    def messages(self, facts: Facts) -> list[Message]:
        if not self.rules:
            return [{"role": "user", "content": self.text(facts)}]
        talk = [{"role": "system", "content": self.rules}]
        for given, caption in self.examples:
            talk += [{"role": "user", "content": list_facts(given)}, {"role": "assistant", "content": caption}]
        return [*talk, {"role": "user", "content": list_facts(facts)}]


def list_facts(facts: Facts) -> str:
    return "; ".join(f"{key}: {value}" for key, value in facts)


PROMPTS = {"examples": Prompt("examples", ""), "rules": Prompt("rules", RULES)}


def get_prompt(name: str) -> Prompt:
    """The prompt of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROMPTS:
        raise ValueError(f"--prompt: got {name!r}; accepted: {', '.join(PROMPTS)}")
    return PROMPTS[name]
