"""Why a request has no result: a status, a code for programs and one line for people."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse


class Refusal(Exception):
    """A request, or one image of it, that is not answered.

    Args:
        status: of HTTP.
        code: for programs, such as 'image_unreadable'; it does not change.
        message: for people; put on one line.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        self.status = status
        self.code = code
        self.message = " ".join(message.split())
        self.retry_after = retry_after
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """The error as it stands in an answer."""
        return {"code": self.code, "message": self.message}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.to_dict()}, self.status, headers)


def broken() -> Refusal:
    """What is said of a mistake of the server's own; the log holds the rest."""
    return Refusal(500, "internal", "the server made a mistake; its log says which.")
