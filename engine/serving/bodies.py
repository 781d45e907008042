"""Bodies as requests: JSON and multipart forms, both in memory only, with what is wrong said in fixed words.

Knows pydantic's kinds of errors and forms; does not know what is asked for.
"""

import json
import re
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from miss.engine.serving.problems import Refused

Request = TypeVar("Request", bound=BaseModel)
LISTS = frozenset({"question", "candidates", "constrain", "window"})  # fields of a form that may be repeated
TEXTS = frozenset({"question", "candidates", "constrain"})
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")  # as JSON has them
WORDS = {  # pydantic's own word for an error, by its beginning, and ours
    "missing": "is missing",
    "extra_forbidden": "has a field that is not known here",
    "literal_error": "has a value that is not offered here",
    "none_required": "is not offered here",
    "union_tag": "has a part of a type that is not known here",
    "string_too": "is too short or too long",
    "string_pattern": "is blank",
    "too_": "has too few or too many entries",
    "greater_than": "is too small",
    "less_than": "is too large",
    "finite_number": "is not a finite number",
}


def read_json(kind: type[Request], body: bytes) -> Request:
    """
    Raises:
        Refused: it is not JSON, or not of this kind.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(kind, error) from None


def explained(kind: type[BaseModel], error: ValidationError) -> Refused:
    """The first of what is wrong, by the name of our field and in our words."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"].startswith("json_"):
        return Refused("bad_json")
    where = [str(part) for part in first["loc"] if isinstance(part, int) or part in _names(kind)]
    words = next((text for start, text in WORDS.items() if first["type"].startswith(start)), "is of the wrong kind")
    name = ".".join(where)
    return Refused("bad_request", name or None, f"`{name or 'body'}` {words}.")


def _names(kind: type[BaseModel]) -> set[str]:
    """All field names of a kind and what it holds: nothing else is ever repeated to a caller."""
    found: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            found.update(schema.get("properties", {}))
            for value in schema.values():
                walk(value)
        elif isinstance(schema, list):
            for value in schema:
                walk(value)

    walk(kind.model_json_schema())
    return found


class InMemoryParser(MultiPartParser):
    """Starlette's, whose files never go to a disk: what is uploaded is a patient's."""

    spool_max_size = 1 << 40


async def read_form(kind: type[Request], headers: Headers, body: bytes) -> tuple[Request, bytes]:
    """A form and its one file, `image`.

    Raises:
        Refused: it is not such a form.
    """

    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    parser = InMemoryParser(headers, stream(), max_files=1, max_fields=4096, max_part_size=1 << 17)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError):  # ValueError: of python-multipart and of text that is not UTF-8
        raise Refused("bad_form") from None
    try:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise Refused("image_required", "image")
        data = await file.read()
        try:
            return kind.model_validate_json(json.dumps(_values(form))), data
        except ValidationError as error:
            raise explained(kind, error) from None
    finally:
        await form.close()


def _values(form: FormData) -> dict[str, Any]:
    """Fields as JSON has them: numbers as numbers, repeated ones as lists; one that is repeated and may not be is a
    list as well, and so of the wrong kind."""
    values: dict[str, Any] = {"image": ""}
    for name in dict.fromkeys(form):
        if name == "image":
            continue
        given = [text if name in TEXTS else _number(text) for text in form.getlist(name) if isinstance(text, str)]
        values[name] = given if name in LISTS or len(given) != 1 else given[0]
    return values


def _number(text: str) -> Any:
    """What a form's text stands for: a truth value, a number, or itself."""
    if text in ("true", "false"):
        return text == "true"
    if not NUMBER.fullmatch(text) or len(text) > 4000:  # Python alone would take " 1_0" and other scripts' digits, too
        return text
    return int(text) if text.lstrip("-").isdigit() else float(text)
