"""Images and texts as a checkpoint's model takes them, the same in training, evaluation and answering.

Knows pixels, token ids and the checkpoint's files; does not know data sets or models.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from miss.models.config import PreprocessConfig

VERSION = 1  # of what this file does to images and texts; part of the fingerprint
MAX_QUESTION_CHARACTERS = 20_000
MAX_ANSWER_TOKENS = 40
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
PAD, UNKNOWN, CLS, SEP, DEC, ENC = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"
TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"


class QuestionError(ValueError):
    """A question that cannot be asked."""


class ProcessorError(ValueError):
    """A tokenizer or preprocessing file that does not fit."""


@dataclass(frozen=True)
class Question:
    """A question as the model takes it.

    ids: [ENC] … [SEP], at most `max_question_length`. text: what was encoded, cleaned. truncated: whether its end was
    cut off. warnings: what the one who asked should know, in whole sentences.
    """

    ids: list[int]
    text: str
    truncated: bool
    warnings: list[str]


class Processor:
    """Preprocessing that belongs to a checkpoint.

    Args:
        preprocess: how images become pixels.
        tokenizer: WordPiece with [PAD], [UNK], [SEP], [DEC] and [ENC].
        max_question_length: tokens of a question, [ENC] and [SEP] included.

    Raises:
        ProcessorError: the tokenizer lacks one of the special tokens.
    """

    def __init__(self, preprocess: PreprocessConfig, tokenizer: Tokenizer, max_question_length: int = 35) -> None:
        self.preprocess = preprocess
        self.max_question_length = max_question_length
        # A copy of its own: truncation and padding are the processor's, and "[SEP]" that a user types is plain text.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.pad, self.unknown = self._id(PAD), self._id(UNKNOWN)
        self.sep, self.dec, self.enc = self._id(SEP), self._id(DEC), self._id(ENC)
        self._special = {i for t in (PAD, CLS, SEP, DEC, ENC) if (i := self.tokenizer.token_to_id(t)) is not None}

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ProcessorError(
                f"the tokenizer has no {token}; wanted a BERT WordPiece tokenizer with {DEC} and {ENC} added "
                f"(build_tokenizer makes one from a vocab.txt)"
            )
        return found

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "Processor":
        """The processor of a checkpoint folder.

        Raises:
            ValueError: a file is missing or wrong.
        """
        from miss.models.weights import read_config

        config, _ = read_config(folder)
        return cls(config.preprocess, read_tokenizer(Path(folder) / TOKENIZER), config.max_question_length)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and preprocessor_config.json into a folder.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER).write_text(self.tokenizer.to_str(), encoding="utf-8")
        text = json.dumps(asdict(self.preprocess), indent=2) + "\n"
        (folder / PREPROCESSOR).write_text(text, encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over all that decides the tensors of an image and a text."""
        parts = {
            "version": VERSION,
            "preprocess": asdict(self.preprocess),
            "tokenizer": json.loads(self.tokenizer.to_str()),
            "max_question_length": self.max_question_length,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Decoded pixels stretched to the model's square: uint8 (H, W, 3) -> uint8 (S, S, 3).

        Pillow's antialiased resampling, which is what torchvision does with a PIL image: bit for bit the original's.
        """
        return stretch(pixels, self.preprocess)

    @property
    def blank(self) -> np.ndarray:
        """An image of the background alone, uint8 (S, S, 3): what the question is asked about without an image."""
        size = self.preprocess.image_size
        return np.full((size, size, 3), self.preprocess.background, dtype=np.uint8)

    def question(self, text: str) -> list[int]:
        """Token ids [ENC] … [SEP], at most `max_question_length`; see `encode_question` for what was cut.

        Raises:
            QuestionError: the question is empty or longer than 20,000 characters.
        """
        return self.encode_question(text).ids

    def encode_question(self, text: str) -> Question:
        """A question with its warnings: cut to `max_question_length` tokens, or mostly outside the vocabulary.

        Raises:
            QuestionError: the question is empty or longer than 20,000 characters.
        """
        if not isinstance(text, str):
            raise QuestionError(f"the question is {type(text).__name__}; wanted text")
        if len(text) > MAX_QUESTION_CHARACTERS:
            raise QuestionError(
                f"the question has {len(text):,} characters; accepted: up to {MAX_QUESTION_CHARACTERS:,} (only the "
                f"first {self.max_question_length} tokens are read); ask a shorter one"
            )
        cleaned = clean_text(text)
        if not cleaned:
            raise QuestionError("the question is empty; ask about the image in words")
        ids = self.tokenizer.encode(cleaned, add_special_tokens=False).ids
        if not ids:
            raise QuestionError("the question holds no readable character; ask about the image in words")
        room = self.max_question_length - 2
        warnings = []
        if len(ids) > room:
            warnings.append(f"the question has {len(ids):,} tokens; only the first {room} were read")
        num_unknown = ids.count(self.unknown)
        if 2 * num_unknown > len(ids):
            warnings.append(f"{num_unknown} of the question's {len(ids)} tokens are not in the vocabulary")
        return Question([self.enc, *ids[:room], self.sep], cleaned, len(ids) > room, warnings)

    def answer(self, text: str) -> list[int]:
        """Token ids [DEC] … [SEP] of an answer to train on, at most 40: [SEP] stays where it is cut.

        Raises:
            ValueError: the answer is empty.
        """
        ids = self.tokenizer.encode(clean_text(text), add_special_tokens=False).ids
        if not ids:
            raise ValueError("an answer to train on is empty; wanted text")
        return [self.dec, *ids[: MAX_ANSWER_TOKENS - 2], self.sep]

    def caption(self, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """Token ids [DEC] … [SEP] of a caption, at most `max_tokens` with both, and whether its end was cut off.

        The first token stands in for those by which pretraining's modes are told apart.

        Raises:
            ValueError: the caption holds no readable character.
        """
        ids = self.tokenizer.encode(clean_text(text), add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"caption {text[:60]!r} holds no readable character; wanted words")
        return [self.dec, *ids[: max_tokens - 2], self.sep], len(ids) > max_tokens - 2

    def decode(self, ids: Iterable[int]) -> str:
        """Generated token ids as text: up to the first [SEP], special tokens left out."""
        kept: list[int] = []
        for token in ids:
            if token == self.sep:
                break
            if token not in self._special:
                kept.append(int(token))
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def stretch(pixels: np.ndarray, preprocess: PreprocessConfig) -> np.ndarray:
    """`Processor.image` without a processor."""
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, (pixels.dtype, pixels.shape)
    size = preprocess.image_size
    if pixels.shape[:2] == (size, size):
        return pixels
    resized = Image.fromarray(pixels).resize((size, size), RESAMPLE[preprocess.resample])
    return np.array(resized, dtype=np.uint8)


def clean_text(text: str) -> str:
    """Text without control characters, invisible format characters and lone surrogates, its white space collapsed."""
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif category not in ("Cf", "Cs", "Co", "Cn"):
            kept.append(character)
    return " ".join("".join(kept).split())


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer.json.

    Raises:
        ProcessorError: it is missing or cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ProcessorError(f"{path}: no such file; a checkpoint folder holds its vocabulary in {TOKENIZER}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception for whatever it cannot read
        raise ProcessorError(
            f"{path}: not a tokenizer.json that can be read; take it from the checkpoint again"
        ) from None


def build_tokenizer(vocabulary: str | os.PathLike[str]) -> Tokenizer:
    """BERT's uncased WordPiece tokenizer over a vocab.txt (one token a line), with [DEC] and [ENC] added at its end.

    With bert-base-uncased's 30,522 tokens these become 30522 and 30523, as in BLIP.

    Raises:
        ProcessorError: the file is missing, or lacks [UNK].
    """
    path = Path(vocabulary)
    if not path.is_file():
        raise ProcessorError(f"{path}: no such file; wanted a vocab.txt, one token a line")
    words = path.read_text(encoding="utf-8").split("\n")
    words = words[:-1] if words and not words[-1] else words
    if UNKNOWN not in words:
        raise ProcessorError(f"{path}: has no {UNKNOWN}; wanted a BERT vocabulary, one token a line")
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    special = [t for t in (PAD, UNKNOWN, CLS, SEP, "[MASK]") if t in words]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (*special, DEC, ENC)])
    return tokenizer
