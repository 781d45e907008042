"""Predictions: what an answerer gives, the file formats they travel in, and the join to the questions by qid.

Knows samples and their qids; does not know models, scoring or reports.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from miss.engine.data.datasets import Sample

Mode = Literal["image", "blank", "shuffled"]
MODES: tuple[Mode, ...] = ("image", "blank", "shuffled")
_SHOWN = 10


class PredictionError(ValueError):
    """A file of predictions, or an answerer's output, that does not fit the questions."""


@dataclass(frozen=True)
class Prediction:
    """An answer to one question; score = exp(logprob) where the answerer knows it, seconds where it was timed."""

    qid: str
    answer: str
    score: float | None = None
    logprob: float | None = None
    seconds: float | None = None


class Answerer(Protocol):
    """Answers every sample once, in any order.

    mode: "image" gives each question its own image; "blank" an image of the background (black) alone; "shuffled" the
    image of another sample.
    """

    def __call__(self, samples: Sequence[Sample], mode: Mode) -> Iterable[Prediction]: ...


def read_predictions(path: Path) -> list[Prediction]:
    """Predictions from a JSON list, or from JSON Lines, of {"qid", "answer"[, "score", "logprob", "seconds"]}.

    Our own predictions.jsonl is taken too: there `prediction` is the model's answer and `answer` the truth.

    Raises:
        PredictionError: not such a file; the message says which row and what is wrong.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PredictionError(f"{path}: not UTF-8 text (byte {error.start}); wanted JSON or JSON Lines") from None
    return [_prediction(row, f"{path}, {where}") for where, row in _rows(text, path)]


def _rows(text: str, path: Path) -> list[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            return [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except (json.JSONDecodeError, RecursionError) as error:
            raise PredictionError(f"{path}: not a whole JSON list ({error}); is the file cut short?") from None
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (json.JSONDecodeError, RecursionError) as error:
            raise PredictionError(
                f'{path}, line {number}: not JSON ({error}); wanted {{"qid": …, "answer": …}}'
            ) from None
    return rows


def _prediction(row: Any, where: str) -> Prediction:
    wanted = 'wanted an object with "qid" (text or whole number) and "answer" (text or number)'
    if not isinstance(row, dict):
        raise PredictionError(f"{where}: got {type(row).__name__}; {wanted}")
    qid, answer = row.get("qid"), row.get("prediction", row.get("answer"))
    if isinstance(qid, bool) or not isinstance(qid, str | int):
        raise PredictionError(f"{where}: qid is {json.dumps(qid)}; {wanted}")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise PredictionError(f"{where} (qid {qid}): answer is {json.dumps(answer)}; {wanted}")
    numbers = {name: _number(row.get(name), name, where) for name in ("score", "logprob", "seconds")}
    if numbers["score"] is None and numbers["logprob"] is not None:
        numbers["score"] = math.exp(min(0.0, numbers["logprob"]))
    return Prediction(str(qid), str(answer), **numbers)


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PredictionError(f"{where}: {name} is {value!r}; wanted a finite number or nothing")
    if name == "score" and not 0 <= value <= 1 + 1e-6:
        raise PredictionError(f"{where}: score is {value!r}; wanted a probability between 0 and 1")
    return float(value)


def join(samples: Sequence[Sample], predictions: Iterable[Prediction], source: str = "predictions") -> list[Prediction]:
    """The predictions in the order of the samples, exactly one each, matched by qid.

    Raises:
        PredictionError: questions without a prediction, predictions without a question, or several of one qid (in
            either); the message counts and lists them.
    """
    predictions = list(predictions)
    wanted, given = Counter(s.qid for s in samples), Counter(p.qid for p in predictions)
    faults = [
        _listed("double qid in the data set", [q for q, num in wanted.items() if num > 1]),
        _listed("missing (no prediction for the qid)", [q for q in wanted if q not in given]),
        _listed("extra (no such question)", [q for q in given if q not in wanted]),
        _listed("double (several predictions of one qid)", [q for q, num in given.items() if num > 1]),
    ]
    if any(faults):
        raise PredictionError(
            f"{source}: got {len(predictions)} rows for {len(samples)} questions; wanted exactly one a qid. "
            + "; ".join(filter(None, faults))
        )
    by_qid = {p.qid: p for p in predictions}
    return [by_qid[s.qid] for s in samples]


def _listed(what: str, qids: list[str]) -> str:
    if not qids:
        return ""
    more = f" and {len(qids) - _SHOWN} more" if len(qids) > _SHOWN else ""
    return f"{len(qids)} {what}: {', '.join(qids[:_SHOWN])}{more}"
