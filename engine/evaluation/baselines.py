"""What can be had without looking: the question-only baseline, and the pairing of questions with another's image.

Knows the training split's questions and answers; does not know models, pixels or statistics.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

from miss.engine.data.datasets import Sample
from miss.engine.evaluation.predictions import Prediction
from miss.engine.evaluation.protocols import normalise

LEVELS = ("question", "question type and first word", "first word", "overall")


class QuestionOnly:
    """The most frequent training answer to the same question, without a model and without the image.

    Questions match by the normaliser. One that training never asked takes the most frequent answer among training
    questions of its question type and first word, then of its first word, then of all. Equally frequent answers: the
    alphabetically first. Its score is the answer's share among those training rows, so its calibration can be read.
    """

    def __init__(self, train: Iterable[Sample]) -> None:
        votes: dict[tuple[int, Hashable], Counter[str]] = defaultdict(Counter)
        self._text: dict[str, str] = {}
        for sample in train:
            answer = normalise(sample.answer)
            self._text.setdefault(answer, sample.answer)
            for key in enumerate(_keys(sample)):
                votes[key][answer] += 1
        self._best = {key: _most_frequent(counts) for key, counts in votes.items()}
        if not self._best:
            raise ValueError("question-only baseline: got no training rows; wanted at least one")
        self.used: Counter[str] = Counter()

    def __call__(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Answers the samples; `used` counts the level that each answer came from."""
        self.used = Counter({level: 0 for level in LEVELS})
        predictions = []
        for sample in samples:
            key = next(key for key in enumerate(_keys(sample)) if key in self._best)
            answer, share = self._best[key]
            self.used[LEVELS[key[0]]] += 1
            predictions.append(Prediction(sample.qid, self._text[answer], share))
        return predictions


def _keys(sample: Sample) -> tuple[Hashable, ...]:
    question = normalise(sample.question)
    first = question.split(" ", 1)[0]
    return question, (sample.question_type, first), first, None


def _most_frequent(counts: Counter[str]) -> tuple[str, float]:
    answer, num = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return answer, num / counts.total()


def other_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """For each sample, the sample whose image it is given in the "shuffled" run.

    All questions of an image get one other image: the images are shuffled with the seed and each hands its questions
    to the next, so none keeps its own and each is used once.

    Raises:
        ValueError: fewer than two images.
    """
    first = {s.image_key: s for s in reversed(samples)}
    images = sorted(first)
    if len(images) < 2:
        raise ValueError(f"shuffled images: got {len(images)} image; wanted at least 2")
    random.Random(seed).shuffle(images)
    follower = dict(zip(images, images[1:] + images[:1], strict=True))
    return [first[follower[s.image_key]] for s in samples]
