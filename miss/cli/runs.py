"""What the commands that run a training have in common: YAML and flags, which checkpoint to go on from, the record.

Knows files and flags; does not know what is trained.
"""

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from miss.models.config import ConfigError


def with_capitals(argv: list[str]) -> list[str]:
    """Flags' `true` and `false` as tyro wants them."""
    return [
        word.capitalize() if word in ("true", "false") and before.startswith("--") else word
        for before, word in zip(["", *argv], argv, strict=False)
    ]


def config_path(argv: list[str]) -> Path | None:
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return Path(argv[i + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


class Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as people mean it (YAML 1.1 wants `1.0e-4`)."""


Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        ConfigError: it is missing, or not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path}: {getattr(error, 'strerror', None) or 'not text'}; wanted a YAML file"
        ) from None
    try:
        values = yaml.load(text, Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: got {type(values).__name__}; wanted a mapping of keys")
    return values


def choose_checkpoint(resume: str, store: Any) -> Path | None:
    """The training checkpoint that --resume means."""
    if resume == "auto":
        return store.newest()  # type: ignore[no-any-return]
    if resume == "none":
        if store.steps():
            raise ConfigError(
                f"--resume none: {store.folder} holds checkpoints of an earlier run; choose another --output, remove "
                f"them, or --resume auto"
            )
        return None
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"--resume: got {resume!r}; accepted: auto, none, or a folder under OUTPUT/checkpoints")
    from miss.engine.training.checkpoint import verify

    verify(path)
    return path


def write_record(config: Any, command: str, output: Path) -> None:
    """`config.yaml` (as resolved) and `environment.json` (versions, commit, command), beside the results."""
    import torch

    import miss

    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    environment = {
        "command": command,
        "miss": miss.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "platform": platform.platform(),
    }
    (output / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def git_commit() -> str | None:
    """The commit of the source tree, with `-dirty` where files were changed; None where it is installed without one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
