"""Requests as questions for the engine, with its parameters by name.

Knows what may be asked together; does not know HTTP, images' bytes or how answers are made.
"""

from typing import Any

from miss.engine.serving.problems import Refused
from miss.engine.serving.protocol import ChatRequest, Choosing, ImagePart, Message, TextPart
from miss.engine.serving.settings import Settings

ONLY_LAST = "this model reads the last question only; earlier turns and system messages are not read"


def parameters(
    asked: Choosing, max_new_tokens: int | None, alternatives: int, longest: int, settings: Settings
) -> dict[str, Any]:
    """SamplingParams by name.

    Raises:
        Refused: two ways of choosing together, or more of something than there may be.
    """
    ways = [asked.candidates, asked.constrain, (asked.temperature or 0) > 0, (asked.num_beams or 1) > 1]
    if sum(bool(way) for way in ways) > 1:
        raise Refused("conflicting")
    for name in ("candidates", "constrain"):
        if len(getattr(asked, name) or ()) > settings.max_candidates:
            raise Refused("bad_request", name, f"Accepted: up to {settings.max_candidates:,} answers.")
    found: dict[str, Any] = {"num_alternatives": alternatives}
    if max_new_tokens is not None:
        found["max_new_tokens"] = min(max_new_tokens, longest)
    for name in ("temperature", "top_p", "top_k", "seed", "num_beams", "candidates", "constrain"):
        value = getattr(asked, name)
        if value is not None:
            found[name] = value
    return found


def question_of(asked: ChatRequest) -> tuple[str, str, list[str]]:
    """(the question, the image's URL, warnings) of a conversation.

    Raises:
        Refused: there is no question, no image, or several in one message.
    """
    users = [message for message in asked.messages if message.role == "user"]
    if not users:
        raise Refused("question_required", "messages")
    question = " ".join(text for text in _texts(users[-1]) if text.strip())
    if not question:
        raise Refused("question_required", "messages")
    urls = next((found for message in reversed(users) if (found := _urls(message))), [])
    if not urls:
        raise Refused("image_required", "messages")
    if len(urls) > 1:
        raise Refused("too_many_images", "messages")
    return question, urls[0], [ONLY_LAST] if len(asked.messages) > 1 else []


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content or () if isinstance(part, TextPart)]


def _urls(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content or () if isinstance(part, ImagePart)]
