"""Runs a target under atheris (libFuzzer), or over the kept corpus without it.

Knows libFuzzer's flags and folders; does not know what a target reads.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path(__file__).resolve().parents[2] / "build" / "fuzz"  # ignored: what a run finds on its way
Target = Callable[[bytes], None]
DEFAULTS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=16384", "-print_final_stats=1")


def instrumented(name: str, *packages: str) -> contextlib.AbstractContextManager[object]:
    """Imports inside it are instrumented for coverage where the module is run as a program, and plain elsewhere."""
    if name != "__main__":
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=list(packages))


def fuzz(target: Target, name: str) -> None:
    """Fuzzes until a flag says stop or an exception gets out: `-max_total_time=600` and all that libFuzzer knows.

    New inputs go to build/fuzz/NAME, one that fails to build/fuzz/NAME-crash-…; the kept corpus is only read.
    """
    import atheris

    grown = FOUND / name
    grown.mkdir(parents=True, exist_ok=True)
    flags = [f for f in DEFAULTS if not any(a.startswith(f.partition("=")[0] + "=") for a in sys.argv[1:])]
    folders = [] if any(not a.startswith("-") for a in sys.argv[1:]) else [str(grown), str(CORPUS / name)]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={FOUND / name}-", *sys.argv[1:], *folders], target)
    atheris.Fuzz()


def kept(name: str) -> Iterator[tuple[str, bytes]]:
    """The corpus of a target: (file name, bytes)."""
    for path in sorted((CORPUS / name).iterdir()):
        yield path.name, path.read_bytes()
