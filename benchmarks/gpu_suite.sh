#!/usr/bin/env bash
# Minutes on a GPU turned into evidence; see `benchmarks/gpu_suite.sh --help` and docs/gpu/README.md.
# Needs Python with torch (and triton); builds nothing, installs nothing, asks nothing of the network.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in "$root/.venv/bin/python" python3 python; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import torch' >/dev/null 2>&1; then python="$candidate"; break; fi
  done
fi
if [ -z "$python" ]; then
  echo "gpu_suite: no Python with torch was found; name one in PYTHON" >&2
  exit 2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$python" -m miss.benchmarks.gpu.suite "$@"
