"""What is done already: the suite's one state file, and the key that says whether it still holds.

Knows the results' folder and the sources' hash; does not know what a part does. Imports no torch: the driver must
outlive whatever torch does.

suite.json: {"format", "key", "source", "commit", "device", "quick", "environment", "parts": {name: part}, "notes"}. A
part has `status` (running, done, partial, failed, hung, skipped), `key`, `seconds`, `limit`, `exit_code`, `date`, the
`tail` of its log where it did not end well, and `result`, whatever it wrote. One that is `running` when the driver
starts was killed with it.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the repository, or of where it is installed
FORMAT = 1
NAME = "suite.json"
MEASURED = ("kernels", "models", "engine")  # floors whose sources the results speak of


def source_hash(root: Path = ROOT) -> str:
    """Of every Python file of the floors that are measured. Line ends do not count; there need be no .git."""
    digest = hashlib.sha256()
    for path in sorted(path for floor in MEASURED for path in (root / floor).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


def commit(root: Path = ROOT) -> str | None:
    """The commit of the tree; None in a copy without its history."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        if (root / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None


def key_of(source: str, environment: dict[str, Any], quick: bool) -> str:
    """What a part's result depends on: sources, device, versions, and how thoroughly."""
    parts = (source, environment.get("gpu") or environment.get("processor"), environment.get("torch"))
    return " ".join(map(str, (*parts, environment.get("triton"), "quick" if quick else "whole")))


class State:
    """The state file of a folder. Every change is on disk at once.

    Raises:
        ValueError: the folder's state cannot be read, or is of another key: what is measured must not be mixed.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.path = folder / NAME
        before = read(self.path) if self.path.exists() else {"parts": {}, "key": head["key"]}
        if before.get("key") != head["key"]:
            raise ValueError(
                f"{folder} holds results of other sources, another device, or another thoroughness "
                f"({before.get('key')}; now {head['key']}): name another folder with --out"
            )
        self.content: dict[str, Any] = {"format": FORMAT, **head, "parts": before["parts"]}

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.content["parts"]
        return found

    def is_done(self, name: str, key: str) -> bool:
        part = self.parts.get(name, {})
        return part.get("status") == "done" and part.get("key") == key

    def was_killed(self, name: str, key: str) -> bool:
        """Whether the part ran when an earlier driver, of the same key, was ended."""
        part = self.parts.get(name, {})
        return part.get("status") == "running" and part.get("key") == key

    def earlier(self, name: str, key: str) -> Any:
        """What an unfinished run of the part, of the same key, has left; None where there is nothing."""
        part = self.parts.get(name, {})
        return part.get("result") if part.get("key") == key else None

    def put(self, name: str, **part: Any) -> None:
        self.parts[name] = {**part, "date": now()}
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)


def read(path: Path) -> dict[str, Any]:
    """A state file.

    Raises:
        ValueError: it is not one; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as the suite's state ({error}); move it away to begin anew") from None
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{path}: is no state of the suite; move it away to begin anew")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: its format is {content.get('format')!r}, this version reads {FORMAT}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
