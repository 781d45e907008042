"""The OpenAPI document, made true: what the routes read themselves, and what the gate answers before any route.

Knows the document's layout; does not know how a request is answered.
"""

from typing import Any

from pydantic import BaseModel

from miss.engine.serving.auth import PUBLIC
from miss.engine.serving.gate import ASKING
from miss.engine.serving.protocol import ChatResponse, ErrorResponse

SCHEMAS = "#/components/schemas/{model}"
OF_THE_GATE = (400, 401, 403, 408, 413, 415, 429, 500, 503)  # whatever the path
EVENT = {
    **{"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}},
    "description": "A chunk as JSON, or [DONE].",
}
TIMEOUT = {
    **{"name": "X-Request-Timeout", "in": "header", "required": False},
    **{"schema": {"type": "number", "exclusiveMinimum": 0}},
    "description": "Seconds for this request; at most the server's own.",
}


def complete(document: dict[str, Any], bodies: dict[str, dict[str, type[BaseModel]]], wants_key: bool) -> None:
    """Adds the bodies by path and media type, every refusal, what chat answers, and the bearer token where one is
    wanted."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for path, kinds in bodies.items():
        content = {media: _reference(schemas, kind) for media, kind in kinds.items()}
        for media, kind in kinds.items():
            if media == "multipart/form-data":
                _without_null(schemas[kind.__name__])
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    refusal = _reference(schemas, ErrorResponse)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _add_refusals(operation, path, refusal)
            if not wants_key or path in PUBLIC:
                operation["responses"].pop("401")
                operation["security"] = []
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    chat["content"] = {
        "application/json": _reference(schemas, ChatResponse),
        "text/event-stream": {"schema": EVENT},
    }
    chat["description"] = "The answer; with `stream`, lines `data: …` of chunks, and `data: [DONE]`"
    document["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if wants_key:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"bearer": []}]


def _reference(schemas: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema(ref_template=SCHEMAS)
    schemas |= schema.pop("$defs", {})
    schemas[kind.__name__] = schema
    return {"schema": {"$ref": SCHEMAS.format(model=kind.__name__)}}


def _without_null(schema: dict[str, Any]) -> None:
    """A form's fields are given or left out: there is no null in it."""
    for field in schema["properties"].values():
        left = [one for one in field.get("anyOf", ()) if one != {"type": "null"}]
        if len(left) == 1:
            del field["anyOf"], field["default"]
            field |= left[0]


def _add_refusals(operation: dict[str, Any], path: str, refusal: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):  # FastAPI's own, which these routes never give
        del responses["422"]
    for status in OF_THE_GATE:
        responses.setdefault(str(status), {"description": "Refused", "content": {"application/json": refusal}})
    if path in ASKING:
        operation.setdefault("parameters", []).append(TIMEOUT)
