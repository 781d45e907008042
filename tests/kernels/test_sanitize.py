"""The checks of csrc/tests/ under the address and undefined-behaviour sanitizers: the plainest instruction set and the
most capable one of this processor. `make sanitize` does all of them, and the kernels' tests besides.
"""

import subprocess

import pytest

from miss.kernels import extension
from tests import sanitize


def why_not() -> str | None:
    """Why nothing can be sanitized here; None where it can."""
    compiler = sanitize.compiler()
    if not extension.buildable():
        return "the CPU kernels are written for x86-64"
    if compiler is None:
        return "no C++ compiler is found"
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if found in ("", name):
            return f"{compiler} comes without {name}"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def kinds() -> list[str]:
    module = extension._module()
    supported = ["avx2"] if isinstance(module, str) else module.supported()
    return list(dict.fromkeys([supported[0], supported[-1]])) if supported else []


@pytest.mark.parametrize("isa", kinds())
def test_checks_are_clean(isa, tmp_path):
    done = sanitize.run_checks(sanitize.build_checks(isa, tmp_path))
    if done.returncode == sanitize.NOT_SUPPORTED:
        pytest.skip(f"this processor does not have {isa}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.count("guarded") >= len(list((sanitize.ROOT / "csrc/tests").glob("check_*.cpp")))


def test_every_table_has_a_check():
    """A table of kernels is added with a check: csrc/tests/check_<name>.cpp."""
    checked = "".join(p.read_text() for p in (sanitize.ROOT / "csrc/tests").glob("check_*.cpp"))
    for header in sorted((sanitize.ROOT / "csrc/cpu").glob("*.h")):
        if "MISS_TABLE(" in header.read_text() and header.name != "isa.h":
            assert f'#include "cpu/{header.name}"' in checked, f"{header.name} has no check in csrc/tests"
