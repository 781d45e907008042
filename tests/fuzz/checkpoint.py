"""`python -m tests.fuzz.checkpoint -max_total_time=600`: any bytes as a checkpoint's header, tensors or configuration.

Knows which errors users may see; does not know models.
"""

import tempfile
from pathlib import Path

from tests.fuzz.harness import fuzz, instrumented

with instrumented(__name__, "miss.models"):
    from miss.models.config import ConfigError, MissConfig
    from miss.models.fitting import CheckpointError
    from miss.models.tensor_file import map_tensors, read_tensors
    from miss.models.weights import config_files, read_config, verify_files

TEMPORARY = tempfile.TemporaryDirectory(prefix="miss-fuzz-")
FOLDER = Path(TEMPORARY.name)
WHOLE = config_files(MissConfig.preset("small"))


def tensors(data: bytes) -> None:
    path = FOLDER / "model.safetensors"
    path.write_bytes(data)
    found, header = read_tensors(path)
    verify_files(FOLDER, found, header)
    mapped = map_tensors(path)
    assert {n: t.shape for n, t in mapped.tensors.items()} == {n: t.shape for n, t in found.items()}


def configuration(data: bytes, name: str) -> None:
    for one, content in {**WHOLE, name: data}.items():
        (FOLDER / one).write_bytes(content)
    read_config(FOLDER)


def one_input(data: bytes) -> None:
    """The first byte chooses the file; of safetensors the length before the header is either the input's or right."""
    choice, data = (data[0] if data else 0) % 4, data[1:]
    try:
        if choice == 0:
            tensors(data)
        elif choice == 1:
            header, _, rest = data.partition(b"\n")
            tensors(len(header).to_bytes(8, "little") + header + rest)
        else:
            configuration(data, "config.json" if choice == 2 else "preprocessor_config.json")
    except (CheckpointError, ConfigError):
        return


if __name__ == "__main__":
    fuzz(one_input, "checkpoint")
