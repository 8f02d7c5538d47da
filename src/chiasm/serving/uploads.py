"""The body of a request as images' bytes, counted while they come: a body that is too large is never held whole.

A body is one image's bytes, or multipart/form-data with one or more files in its field `images`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from chiasm.serving.refusals import Refusal

if TYPE_CHECKING:
    from starlette.requests import Request

FIELD = "images"
# A body of several images may be so many times as large as one image may be.
SEVERAL = 4
_PARTS = 16  # parts other than images that are passed over


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may bring.

    Attributes:
        bytes: of one image as it is sent.
        pixels: of one image as it is decoded.
        images: of one request.
        seconds: in which one image's bytes come; a body of several has so many times as long as it may be larger.
        held: bytes of all requests together.
    """

    bytes: int
    pixels: int
    images: int
    seconds: float
    held: int


@dataclass
class Upload:
    """One image as it was sent: what its sender calls it, and its bytes."""

    name: str
    data: bytes


class Held:
    """Counts the bytes that requests hold, all together.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self.bytes = 0
        self._most = most

    def add(self, count: int) -> None:
        """Raises:
        Refusal: 429 where that is too much.
        """
        if self.bytes + count > self._most:
            raise Refusal(429, "busy", "the images that wait here fill the memory set aside for them.", retry_after=2)
        self.bytes += count


async def read_uploads(request: Request, limits: Limits, held: Held) -> list[Upload]:
    """The images of a request; their bytes are added to `held`, also where this fails.

    Raises:
        Refusal: 408 for a body that does not come, 413 for one too large, 415 for another kind, 422 for one that is
            empty or damaged or has too many images, 429 where memory is full.
    """
    kind, options = parse_options_header(request.headers.get("content-type", "application/octet-stream"))
    several = kind == b"multipart/form-data"
    if not several and not kind.startswith(b"image/") and kind != b"application/octet-stream":
        raise Refusal(
            415,
            "content_type",
            f"Content-Type is {kind.decode('latin-1')[:80]!r}: expected an image's bytes (image/*, "
            f"application/octet-stream) or multipart/form-data with the field '{FIELD}'.",
        )
    most = limits.bytes * (SEVERAL if several else 1)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most)
    chunks = _chunks(request, most, limits.seconds * (SEVERAL if several else 1), held)
    if not several:
        data = b"".join([chunk async for chunk in chunks])
        if not data:
            raise Refusal(422, "no_image", f"the body is empty: send an image's bytes, or the field '{FIELD}'.")
        return [Upload("image", data)]
    form = _Form(options.get(b"boundary", b""), limits)
    async for chunk in chunks:
        form.write(chunk)
    return form.end()


async def _chunks(request: Request, most: int, seconds: float, held: Held) -> AsyncIterator[bytes]:
    size, more = 0, True
    end = time.monotonic() + seconds
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), end - time.monotonic())
        except TimeoutError:
            raise Refusal(408, "slow_upload", f"the body did not come within {seconds:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise Refusal(499, "gone", "the client went away.")
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        held.add(len(chunk))
        if chunk:
            yield chunk


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is too large: at most {most / 1e6:g} MB are taken.")


class _Form:
    """The files in the field `images` of multipart/form-data, collected while it comes."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self._limits = limits
        self._uploads: list[Upload] = []
        self._others = 0
        self._header = [b"", b""]
        self._headers: dict[bytes, bytes] = {}
        self._data: bytearray | None = None
        self._ended = False
        calls: dict[str, Any] = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._more(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more(1, data[start:end]),
            "on_header_end": self._keep,
            "on_headers_finished": self._open,
            "on_part_data": self._fill,
            "on_part_end": self._close,
            "on_end": self._end,
        }
        if not 0 < len(boundary) <= 200:
            raise _damaged("its Content-Type has no boundary")
        try:
            self._parser = MultipartParser(boundary, calls)  # type: ignore[arg-type]
        except MultipartParseError as error:
            raise _damaged(str(error)) from error

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _damaged(str(error)) from error

    def end(self) -> list[Upload]:
        if not self._ended:
            raise _damaged("it is cut off")
        if not self._uploads:
            raise Refusal(422, "no_image", f"the form has no file in its field '{FIELD}'.")
        return self._uploads

    def _begin(self) -> None:
        self._headers = {}

    def _more(self, part: int, text: bytes) -> None:
        self._header[part] += text

    def _keep(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = [b"", b""]

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if options.get(b"name", b"") != FIELD.encode():
            self._others += 1
            if self._others > _PARTS:
                raise _damaged(f"it has more than {_PARTS} fields other than '{FIELD}'")
            return
        if len(self._uploads) == self._limits.images:
            raise Refusal(
                422, "too_many_images", f"more than {self._limits.images} images: send them in several requests."
            )
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        self._uploads.append(Upload(_tidy(name) or f"image {len(self._uploads)}", b""))
        self._data = bytearray()

    def _fill(self, data: bytes, start: int, end: int) -> None:
        if self._data is None:
            return
        self._data += data[start:end]
        if len(self._data) > self._limits.bytes:
            raise _too_large(self._limits.bytes)

    def _close(self) -> None:
        if self._data is not None:
            self._uploads[-1].data = bytes(self._data)
            self._data = None

    def _end(self) -> None:
        self._ended = True


def _tidy(name: str) -> str:
    """A file's name as a sender gives it, without folders or what would disturb a line of text."""
    name = name.replace("\\", "/").rpartition("/")[2]
    return "".join(letter for letter in name if letter.isprintable())[:200].strip()


def _damaged(why: str) -> Refusal:
    return Refusal(422, "form_damaged", f"the body is no sound multipart/form-data: {why}.")
