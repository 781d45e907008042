"""Every Triton kernel in Triton's interpreter, in processes of their own: that it interprets is settled at its import.

Interpreted, bfloat16 products are made in float32 (miss.kernels.triton_parts.dot), conversions to bfloat16 truncate,
and programs run one after another: what a GPU rounds, races and misaligned loads are not shown.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.device import INSTALLED

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(f.name for f in FOLDER.glob("test_*.py"))
SHARES = 3  # importing torch and Triton takes 4 s: a process a file was 80 s of imports


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed: pip install 'miss-engine[triton]'")
@pytest.mark.parametrize("share", range(SHARES))
def test_interpreted(share):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    files = [str(FOLDER / name) for name in FILES[share::SHARES]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
