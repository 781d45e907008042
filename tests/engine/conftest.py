"""A tiny tokenizer and processor for tests that need no weights."""

import importlib.util
from pathlib import Path

import pytest

from miss.engine.data.processor import Processor, build_tokenizer
from miss.models.config import PreprocessConfig

# These make DICOM files.
collect_ignore = [] if importlib.util.find_spec("pydicom") else ["test_images.py", "test_facts.py"]

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] is there a an the in this image what which organ of left right lung liver brain "
    "chest abdomen ct mri x ray yes no mass fracture effusion normal abnormal where side does picture show pneumonia "
    "one two three - / ? ! . , ' ( ) 0 1 2 3 t ##s ##e ##a ##ed ##ing ##ray ##1 ##2"
).split()


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt of 80-odd tokens."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def processor(vocabulary: Path) -> Processor:
    """28-pixel images and the tiny vocabulary."""
    return Processor(PreprocessConfig(image_size=28, resample="bicubic"), build_tokenizer(vocabulary))
