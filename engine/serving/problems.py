"""All that a server may say when there is no answer: a fixed vocabulary.

Knows codes, statuses and sentences; does not know what happened in detail: no text of an exception, no value that a
caller sent, no path and no address is ever part of a body.
"""

from dataclasses import dataclass
from typing import Any

from miss.engine.data.errors import Reason

REJECTED, FAILED, CANCELLED, ANSWERED = "rejected", "failed", "cancelled", "answered"


@dataclass(frozen=True)
class Problem:
    """status: of HTTP. type: OpenAI's word. outcome: which counter it raises. closes: the connection with it."""

    status: int
    type: str
    message: str
    outcome: str = REJECTED
    closes: bool = False
    retry_after: int | None = None


def _client(status: int, message: str, closes: bool = False) -> Problem:
    return Problem(status, "invalid_request_error", message, closes=closes)


def _image(message: str) -> Problem:
    return _client(422, message)


ACCEPTED = "accepted are PNG, JPEG, WebP, BMP, TIFF and DICOM"
PROBLEMS = {
    "bad_json": _client(400, "The body is not JSON, or is nested too deeply."),
    "bad_form": _client(400, "The body is not a multipart form with one file `image` and a field `question`."),
    "bad_request": _client(400, "A parameter is missing, of the wrong kind or out of range; see /openapi.json."),
    "bad_timeout": _client(400, "The timeout is not a number of seconds above 0."),
    "bad_content_length": _client(400, "The Content-Length is not a whole number.", closes=True),
    "bad_host": _client(400, "A server without a key answers to the names of this machine's loopback only."),
    "conflicting": _client(400, "Give one of candidates, constrain, temperature above 0 and num_beams above 1."),
    "unsupported": _client(400, "This model does not offer that parameter, or not in that value."),
    "image_required": _client(400, "There is no image; give one as a data: URL."),
    "too_many_images": _client(400, "There is more than one image in the last message that has any; give one."),
    "question_required": _client(400, "There is no question in the last user message."),
    "bad_question": _client(400, "The question holds no readable character, or more than 20,000."),
    "invalid": _client(400, "This model cannot answer with these parameters together: their values are out of range."),
    "unauthorized": Problem(401, "authentication_error", "Wanted: Authorization: Bearer with this server's key."),
    "bad_origin": _client(403, "Pages of other origins may not ask a server without a key."),
    "not_found": _client(404, "There is no such path; see /docs."),
    "model_not_found": _client(404, "There is no such model here; see /v1/models."),
    "method_not_allowed": _client(405, "This path does not take that method; see /docs."),
    "request_timeout": _client(408, "The request was not sent in time.", closes=True),
    "content_too_large": _client(413, "The body is larger than this server takes.", closes=True),
    "content_encoded": _client(415, "Compressed bodies are not taken; send it without Content-Encoding.", closes=True),
    "unsupported_media_type": _client(
        415, "Wanted application/json, or multipart/form-data for /v1/vqa and /v1/image."
    ),
    "image_not_base64": _image("The image is not base64."),
    "image_url_refused": _image("That URL is not taken; give the image as a data: URL with base64."),
    "image_url_failed": _image("The URL gave no image in time; give the image as a data: URL with base64."),
    "image_unreadable": _image("The image cannot be read."),
    "image_empty": _image("The image is empty."),
    "image_not_an_image": _image(f"The content is not an image that is known here; {ACCEPTED}, told by content."),
    "image_unsupported_format": _image(f"The image's format is not taken; {ACCEPTED}."),
    "image_truncated": _image("The image ends before its end; send the whole file."),
    "image_corrupt": _image("The image is damaged."),
    "image_too_large": _image("The image has more bytes, or takes more memory, than there may be."),
    "image_too_many_pixels": _image("The image declares more pixels than are taken; scale it down first."),
    "image_too_small": _image("The image is too small."),
    "image_too_many_frames": _image("The image declares more frames than are taken; export the one to ask about."),
    "image_no_such_frame": _image("The image has no such frame."),
    "image_bad_option": _image("The frame or window does not fit this image."),
    "image_missing_decoder": _image("This server has no decoder for that kind of compressed DICOM."),
    "image_too_slow": _image("The image took too long to decode."),
    "image_too_hungry": _image("The image took too much memory to decode."),
    "queue_full": Problem(429, "rate_limit_error", "Too many requests are waiting; ask again later.", retry_after=1),
    "client_gone": Problem(499, "invalid_request_error", "The client went away.", CANCELLED, closes=True),
    "internal": Problem(500, "server_error", "The server failed under this request.", FAILED),
    "fault": Problem(500, "server_error", "The engine failed under this request; ask again.", FAILED),
    "not_ready": Problem(503, "server_error", "The engine is starting; ask again soon.", retry_after=2),
    "draining": Problem(503, "server_error", "The server is stopping; ask another.", closes=True, retry_after=5),
    "restarted": Problem(503, "server_error", "The engine ended under this request; ask again.", FAILED, retry_after=2),
    "out_of_memory": Problem(503, "server_error", "There was not enough memory for this request.", FAILED),
    "deadline": Problem(504, "server_error", "The request's time ran out.", FAILED),
}
OF_IMAGES = {reason: f"image_{reason.value}" for reason in Reason}
OF_IMAGES |= dict.fromkeys((Reason.NOT_FOUND, Reason.IS_DIRECTORY, Reason.NO_PERMISSION), "image_unreadable")


class Refused(Exception):
    """There is no answer; `code` is a word of PROBLEMS, `param` a name of ours, `detail` a sentence of ours."""

    def __init__(self, code: str, param: str | None = None, detail: str | None = None) -> None:
        super().__init__(code)
        self.code, self.param, self.detail = code, param, detail
        self.problem = PROBLEMS[code]

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        message = f"{self.problem.message} {self.detail}" if self.detail else self.problem.message
        return {"error": {"message": message, "type": self.problem.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {}
        if self.problem.retry_after is not None:
            found["retry-after"] = str(self.problem.retry_after)
        if self.problem.closes:
            found["connection"] = "close"
        if self.problem.status == 401:
            found["www-authenticate"] = "Bearer"
        return found
