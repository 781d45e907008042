"""Flags where tyro is not installed: the same words give the same dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from miss.cli import flags
from miss.cli.bench import CompareArgs, KernelArgs
from miss.cli.flags import Append, Positional
from miss.cli.kernels_validate import ValidateArgs
from miss.cli.profile import Args as ProfileArgs


@dataclass
class Toy:
    """A toy."""

    source: Annotated[Path, Positional]
    """Where from."""
    numbers: tuple[int, ...] = (1,)
    """Some, 100% whole."""
    rate: float | None = None
    kind: Literal["a", "b"] = "a"
    ask: Annotated[list[str], Append] = field(default_factory=lambda: ["what?"])
    loud: bool = False


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Toy, "here"),
        (Toy, "here --numbers 3 4 --rate 0.5 --kind b --ask x --ask y --loud"),
        (Toy, "here --numbers --no-loud"),
        (KernelArgs, ""),
        (KernelArgs, "--op attention layer_norm --device cpu --dtype bfloat16 --shapes small --repeats 3 --json"),
        (KernelArgs, "--out some/where --threads 2"),
        (CompareArgs, "a.jsonl b.jsonl --limit 5"),
        (ValidateArgs, "--minutes 0.5 --device cpu --quick --out e.json --preset small --dtype float32 bfloat16"),
        (ProfileArgs, "--device cpu --repeats 1 --trace t.json --question why --question when"),
    ],
)
def test_both_readers_agree(kind, words):
    argv = words.split()
    assert flags.plain(kind, argv, "miss toy") == flags.parse(kind, argv, "miss toy")


@pytest.mark.parametrize("words", ["", "here --kind c", "here --numbers x", "here --nummbers 1", "here --rate"])
def test_wrong_usage_leaves_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        flags.plain(Toy, words.split(), "miss toy")
    assert stop.value.code == 2 and "miss toy" in capsys.readouterr().err


def test_help_is_the_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.plain(Toy, ["--help"], "miss toy")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "A toy." in out and "Where from." in out and "100% whole" in out


def test_a_flag_of_another_kind_names_what_is_missing():
    @dataclass
    class Odd:
        part: Toy | None = None

    with pytest.raises(ModuleNotFoundError) as missing:
        flags.plain(Odd, [], "miss odd")
    assert missing.value.name == "tyro"
