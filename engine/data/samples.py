"""One question about one image, whatever data set it comes from.

Knows fields; does not know files or how they are read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from miss.engine.data.shards import PackedImage

AnswerType = Literal["open", "closed"]


@dataclass(frozen=True)
class Sample:
    """A row of a data set; what a set does not say is None.

    qid: unique within its data set. image: what `decode_image` takes. image_key: the same for all questions of one
    image, and unique over all sets. also_in: other data sets that hold the same image, where the publisher says so.
    """

    qid: str
    image: "Path | PackedImage"
    question: str
    answer: str
    answer_type: AnswerType | None
    language: str
    modality: str | None
    organ: str | None
    question_type: str | None
    image_key: str
    content_type: str | None = None
    dataset: str = "jsonl"
    also_in: tuple[str, ...] = ()
