"""What requests and answers look like: OpenAI's chat completions as far as this model has them, and our own `vqa`.

Knows fields, their kinds and ranges; does not know HTTP, images' bytes or the engine. Unknown fields are refused, and
so are those of OpenAI that this model cannot honour, unless they hold what changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=20_000)]
Question = Annotated[str, Field(max_length=20_000, pattern=r"\S")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Answers = Annotated[list[Annotated[str, Field(min_length=1, max_length=500, pattern=r"\S")]], Field(min_length=1)]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Choosing(Model):
    """How an answer is chosen; at most one of candidates, constrain, temperature > 0 and num_beams > 1."""

    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=16)] | None = None
    candidates: Answers | None = Field(None, description="The answers to rank; each is scored in full.")
    constrain: Answers | None = Field(None, description="The answers that may be generated, token by token.")
    timeout: Annotated[Finite, Field(gt=0)] | None = Field(None, description="Seconds; at most the server's own.")
    frame: Annotated[int, Field(ge=0, le=1_000_000)] | None = Field(None, description="Of a series, from 0.")
    window: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = Field(
        None, description="(centre, width) for DICOM, 16-bit and float images, in the image's units."
    )


class TextPart(Model):
    type: Literal["text"]
    text: Text


class ImageUrl(Model):
    url: str = Field(description="data:image/…;base64,…")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Model):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=64)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None


class StreamOptions(Model):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Model):
    type: Literal["text"]


class ChatRequest(Choosing):
    """The last user message's text is the question; the image is the last one in any user message."""

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Of greedy answers.")
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    response_format: TextFormat | None = None
    stop: None = None
    tools: None = None
    tool_choice: Literal["none", "auto"] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = Field(None, description="Not looked at.")
    metadata: dict[str, str] | None = Field(None, description="Not looked at.")
    store: Literal[False] | None = None


ONE_OF_QUESTIONS: dict[str, Any] = {
    "oneOf": [
        {"required": ["question"], "properties": {"question": {"type": "string"}}},
        {"required": ["questions"], "properties": {"questions": {"type": "array"}}},
    ]
}


class VqaRequest(Choosing):
    """One image, and one question (`question`) or several (`questions`)."""

    model_config = ConfigDict(json_schema_extra=ONE_OF_QUESTIONS)

    image: str = Field(description="A data: URL with base64, or base64 alone.")
    question: Question | None = None
    questions: Annotated[list[Question], Field(min_length=1)] | None = None
    alternatives: Annotated[int, Field(ge=0, le=15)] = 2
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    attention_map: bool = False


class VqaForm(Choosing):
    """As `vqa` in JSON, with the image as a file; lists are repeated fields."""

    image: str = Field(json_schema_extra={"format": "binary"})
    question: Annotated[list[Question], Field(min_length=1)]
    alternatives: Annotated[int, Field(ge=0, le=15)] = 2
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    attention_map: bool = False


class Attention(BaseModel):
    """Where attention went for each token of the answer: maps of (rows, columns) over the image as the model sees it,
    and what went to no patch (`elsewhere`); a token's map and its elsewhere sum to 1. No proof of what it rests on."""

    tokens: list[str]
    maps: list[list[list[float]]]
    elsewhere: list[float]


class Alternative(BaseModel):
    answer: str
    score: float
    logprob: float


class VqaAnswer(BaseModel):
    """score: the probability of exactly this answer, of a list's answers where one was given."""

    answer: str
    score: float
    logprob: float
    finished: bool
    alternatives: list[Alternative]
    warnings: list[str]
    seconds: dict[str, float]
    attention: Attention | None = None


class VqaResponse(BaseModel):
    id: str
    model: str
    intended_use: str
    answers: list[VqaAnswer]
    usage: dict[str, int]
    seconds: float


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[float]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class Choice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class Details(BaseModel):
    """What OpenAI's protocol has no place for."""

    scores: list[float]
    logprobs: list[float]
    warnings: list[str]
    seconds: dict[str, float]
    intended_use: str


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]
    miss: Details


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorResponse(BaseModel):
    error: ErrorBody


def answer_of(answer: dict[str, Any]) -> VqaAnswer:
    """An engine's answer as it is shown."""
    others = [Alternative(answer=a["text"], score=a["score"], logprob=a["logprob"]) for a in answer["alternatives"]]
    kept = {name: answer[name] for name in ("score", "logprob", "finished", "warnings", "seconds")}
    attention = Attention(**answer["attention"]) if "attention" in answer else None
    return VqaAnswer(answer=answer["text"], alternatives=others, attention=attention, **kept)
