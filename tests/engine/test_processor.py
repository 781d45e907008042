"""Processor: the same tensors everywhere, questions cleaned, special tokens out of a user's reach."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miss.engine.data.processor import Processor, ProcessorError, QuestionError, build_tokenizer, clean_text
from miss.models.config import PreprocessConfig


def test_markers_follow_the_vocabulary(processor: Processor, vocabulary: Path) -> None:
    num_words = len(vocabulary.read_text().split())
    assert (processor.dec, processor.enc) == (num_words, num_words + 1)
    assert processor.question("is there a mass?")[0] == processor.enc
    assert processor.answer("yes")[0] == processor.dec


def test_question_and_answer_ids(processor: Processor) -> None:
    words = processor.tokenizer.token_to_id
    expected = [processor.enc, *map(words, ["is", "there", "a", "mass", "?"]), words("[SEP]")]
    assert processor.question("Is there a MASS?") == expected
    assert processor.question("  is\tthere\n\na \x00\x07mass\u200b?  ") == expected
    assert processor.answer("No") == [processor.dec, words("no"), words("[SEP]")]


def test_decode_is_the_inverse_and_stops_at_the_first_separator(processor: Processor) -> None:
    for text in ("yes", "left lung", "no fracture", "pneumonia, right lung"):
        assert processor.decode(processor.answer(text)) == text
    ids = processor.answer("left")
    assert processor.decode([*ids, *processor.answer("liver")]) == "left"
    assert processor.decode([]) == "" and processor.decode([processor.dec, processor.sep]) == ""
    assert processor.decode([processor.pad, *processor.answer("brain")[1:]]) == "brain"


def test_a_user_cannot_type_special_tokens(processor: Processor) -> None:
    for typed in ("[SEP]", "[DEC]", "[ENC]", "[PAD]", "[CLS]"):
        ids = processor.question(f"is there {typed} a mass?")
        assert not set(ids[1:-1]) & {processor.sep, processor.dec, processor.enc, processor.pad}, typed


def test_long_questions_are_cut_and_say_so(processor: Processor) -> None:
    short = processor.encode_question("is there a mass?")
    assert not short.truncated and short.warnings == []
    exact = processor.encode_question("mass " * 33)
    assert len(exact.ids) == 35 and not exact.truncated
    cut = processor.encode_question("mass " * 34)
    assert len(cut.ids) == 35 and cut.truncated and cut.ids[-1] == processor.sep
    assert cut.warnings == ["the question has 34 tokens; only the first 33 were read"]
    assert processor.encode_question("mass " * 3_000).truncated  # words by the thousand, still within bounds
    with pytest.raises(QuestionError, match="20,000"):
        processor.question("mass " * 10_000)


def test_other_scripts_are_asked_with_a_warning(processor: Processor) -> None:
    asked = processor.encode_question("这张图片是什么器官？")
    assert len(asked.ids) > 2 and "not in the vocabulary" in asked.warnings[0]
    assert processor.encode_question("le poumon is normal?").warnings == []


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\x00\x01\x7f", "\u200b\u200d\ufeff", "\ud800", "\u2028"])
def test_empty_questions(processor: Processor, text: str) -> None:
    with pytest.raises(QuestionError, match="empty"):
        processor.question(text)
    with pytest.raises(ValueError, match="empty"):
        processor.answer(text)


def test_a_question_that_is_no_text(processor: Processor) -> None:
    for value in (None, 5, b"is there a mass?", ["is"]):
        with pytest.raises(QuestionError, match="wanted text"):
            processor.question(value)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_question_or_an_error(processor: Processor, text: str) -> None:
    try:
        ids = processor.question(text)
    except QuestionError:
        return
    assert 3 <= len(ids) <= 35 and ids[0] == processor.enc and ids[-1] == processor.sep
    assert not set(ids[1:-1]) & {processor.sep, processor.dec, processor.enc, processor.pad}
    assert isinstance(processor.decode(ids[1:]), str)


@given(st.text(max_size=80))
def test_cleaning_is_idempotent(text: str) -> None:
    assert clean_text(clean_text(text)) == clean_text(text)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (64, 48), (27, 29), (500, 333)])
def test_images_are_stretched_by_pillow(vocabulary: Path, resample: str, shape: tuple[int, int]) -> None:
    made = Processor(PreprocessConfig(image_size=28, resample=resample), build_tokenizer(vocabulary))  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resample]
    resized = made.image(pixels)
    assert resized.shape == (28, 28, 3) and resized.dtype == np.uint8 and resized.flags.writeable
    assert np.array_equal(resized, np.asarray(Image.fromarray(pixels).resize((28, 28), method)))


def test_resizing_repeats_what_hugging_face_does_with_a_pil_image(vocabulary: Path) -> None:
    pytest.importorskip("transformers")
    from transformers.image_transforms import resize

    pixels = np.random.default_rng(1).integers(0, 255, (90, 61, 3), dtype=np.uint8)
    made = Processor(PreprocessConfig(image_size=42, resample="bicubic"), build_tokenizer(vocabulary))
    assert np.array_equal(made.image(pixels), resize(pixels, (42, 42), resample=Image.Resampling.BICUBIC))


def test_an_image_of_the_right_size_is_untouched(processor: Processor) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    assert np.array_equal(processor.image(pixels), pixels)
    assert processor.blank.shape == (28, 28, 3) and processor.blank.max() == 0


def test_fingerprint_changes_with_all_that_decides_the_tensors(vocabulary: Path, tmp_path: Path) -> None:
    base, tokenizer = PreprocessConfig(image_size=28), build_tokenizer(vocabulary)
    seen = {Processor(base, tokenizer).fingerprint}
    assert Processor(base, build_tokenizer(vocabulary)).fingerprint in seen
    changes = [
        dataclasses.replace(base, image_size=56),
        dataclasses.replace(base, resample="bicubic"),
        dataclasses.replace(base, image_mean=(0.5, 0.0, 0.0)),
        dataclasses.replace(base, image_std=(0.5, 1.0, 1.0)),
        dataclasses.replace(base, rescale_factor=1 / 255),
        dataclasses.replace(base, background=(1, 0, 0)),
    ]
    made = [Processor(change, tokenizer) for change in changes] + [Processor(base, tokenizer, max_question_length=20)]
    other = tmp_path / "vocab.txt"
    other.write_text(vocabulary.read_text() + "tumour\n")
    made.append(Processor(base, build_tokenizer(other)))
    prints = {p.fingerprint for p in made}
    assert len(prints) == len(made) and not prints & seen


def test_saving_writes_what_a_checkpoint_reads(processor: Processor, tmp_path: Path) -> None:
    from miss.engine.data.processor import read_tokenizer
    from miss.models.config import from_dict
    from miss.models.weights import read_json

    processor.save(tmp_path)
    again = Processor(
        from_dict(PreprocessConfig, read_json(tmp_path / "preprocessor_config.json")),
        read_tokenizer(tmp_path / "tokenizer.json"),
    )
    assert again.fingerprint == processor.fingerprint
    assert again.question("is there a mass?") == processor.question("is there a mass?")


def test_a_caller_s_tokenizer_is_not_changed(vocabulary: Path) -> None:
    tokenizer = build_tokenizer(vocabulary)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    before = tokenizer.to_str()
    made = Processor(PreprocessConfig(image_size=28), tokenizer)
    assert tokenizer.to_str() == before
    assert len(made.question("is there a mass in this image?")) == 10


def test_tokenizers_that_do_not_fit(tmp_path: Path, vocabulary: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece

    from miss.engine.data.processor import read_tokenizer

    bare = Tokenizer(WordPiece({"[UNK]": 0, "[PAD]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    with pytest.raises(ProcessorError, match=r"\[DEC\]"):
        Processor(PreprocessConfig(), bare)
    with pytest.raises(ProcessorError, match="no such file"):
        build_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(ProcessorError, match="no such file"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ProcessorError, match="cannot be read|can be read"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ProcessorError, match=r"\[UNK\]"):
        build_tokenizer(tmp_path / "vocab.txt")


def test_words_are_those_of_bert(vocabulary: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizerFast(tokenizer_object=build_tokenizer(vocabulary))
    made = Processor(PreprocessConfig(image_size=28), build_tokenizer(vocabulary))
    for text in ("Is there a MASS?", "x-ray, t2", "what organ's normal (left)!", "pneumonía"):
        assert made.question(text)[1:-1] == theirs(text, add_special_tokens=False)["input_ids"]
