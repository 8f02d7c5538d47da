"""The JSON of the API as OpenAPI describes it, with examples. Answers are not built from these: they are what tests
hold the answers against."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from chiasm.serving.uploads import FIELD

Task = Literal["classify", "detect", "instances", "segment"]
_Share = Field(ge=0, le=1)
_Url = Field(
    default=None,
    pattern="^data:image/png;base64,",
    description="with overlay=true",
    examples=["data:image/png;base64,iVBORw0KGgo..."],
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Failure(_Strict):
    """What went wrong."""

    code: str = Field(description="for programs; it does not change", examples=["image_unreadable"])
    message: str = Field(description="for people, one line", examples=["cat.jpg: not a readable image: a PDF."])


class Error(_Strict):
    """The answer in place of a result."""

    error: Failure


class Score(_Strict):
    label: str
    score: float = _Share


class Vote(_Strict):
    label: str
    probability: float = _Share


class Mask(_Strict):
    """COCO's compressed run lengths."""

    size: list[int] = Field(min_length=2, max_length=2)
    counts: str


class Object(_Strict):
    label: str
    score: float = _Share
    box: list[float] = Field(min_length=4, max_length=4, description="left, top, right, bottom in pixels")
    mask: Mask | None = None


class Region(_Strict):
    label: str
    share: float = _Share
    mask: Mask


class Colour(_Strict):
    """A class in the overlay; `count` objects, or its `share` of the pixels."""

    label: str
    colour: str = Field(pattern="^#[0-9a-f]{6}$")
    count: int | None = None
    share: float | None = None


class _Image(_Strict):
    source: str = Field(description="the name of the file as it was sent")
    width: int = Field(ge=1, description="pixels, upright")
    height: int = Field(ge=1)


class Classified(_Image):
    label: str
    score: float = _Share
    top: list[Score]
    branches: dict[str, list[Vote]] = Field(description="of each branch its own best classes; {} without branches")
    agreement: bool | None = Field(description="whether all branches vote for one class; null without branches")


class Detected(_Image):
    objects: list[Object]
    legend: list[Colour]
    overlay: str | None = _Url


class Segmented(_Image):
    regions: list[Region]
    legend: list[Colour]
    overlay: str | None = _Url


class Failed(_Strict):
    """An image of several that has no result."""

    source: str
    error: Failure


class Predictions(_Strict):
    """The results of the images, in their order."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "model": "photos",
                "task": "classify",
                "results": [
                    {
                        "source": "cat.jpg",
                        "width": 640,
                        "height": 480,
                        "label": "cat",
                        "score": 0.91,
                        "top": [{"label": "cat", "score": 0.91}, {"label": "dog", "score": 0.09}],
                        "branches": {
                            "conv": [{"label": "cat", "probability": 0.88}, {"label": "dog", "probability": 0.12}],
                            "tokens": [{"label": "cat", "probability": 0.93}, {"label": "dog", "probability": 0.07}],
                        },
                        "agreement": True,
                    }
                ],
            }
        },
    )
    model: str
    task: Task
    results: list[Classified | Detected | Segmented | Failed]


class Explained(_Strict):
    """What spoke for one answer."""

    subject: str = Field(examples=["cat"])
    label: str
    scores: dict[str, float]
    overlap: float | None = Field(description="how far the branches look at the same places, 0..1")
    region: list[float] = Field(description="left, top, right, bottom of what the maps cover, in pixels of the image")
    box: list[float] | None
    maps: dict[str, str] = Field(
        description="'conv', 'tokens' or 'model', and 'fused': grey PNG at the map's own resolution, its peak 255"
    )
    layers: dict[str, str] = Field(
        description="the same, and 'disagreement', in colours with alpha, to be stretched over the image"
    )


class Explanations(_Strict):
    """What spoke for the answers of one image."""

    model: str
    task: Task
    width: int
    height: int
    explanations: list[Explained]


class Model(_Strict):
    name: str
    task: Task
    architecture: str
    labels: list[str]
    branches: list[str]
    image_size: list[int] = Field(description="height and width of the network's input")
    default: bool


class Allowed(_Strict):
    bytes: int
    pixels: int
    images: int


class ModelList(_Strict):
    """The models here and what a request may bring."""

    models: list[Model]
    limits: Allowed


class State(_Strict):
    status: str = Field(examples=["ok"])


_REASONS = {
    401: ("key", "this server needs its key: 'Authorization: Bearer KEY' or 'X-API-Key: KEY'."),
    403: ("origin", "Origin is 'https://example.org': other sites' pages are answered if --cors names them."),
    404: ("unknown_model", "unknown model 'cats'; did you mean cat? Here is cat, dog."),
    408: ("slow_upload", "the body did not come within 30 seconds."),
    413: ("body_too_large", "the body is too large: at most 20 MB are taken."),
    415: (
        "content_type",
        "Content-Type is 'text/plain': expected an image's bytes (image/*, application/octet-stream) or "
        "multipart/form-data with the field 'images'.",
    ),
    422: ("image_unreadable", "cat.jpg: not a readable image: the file is empty (0 bytes)."),
    429: ("busy", "the queue is full (256): try again in 3 s."),
    500: ("internal", "the server made a mistake; its log says which."),
    503: ("stopping", "the server is stopping."),
    504: ("timeout", "no answer within 30 seconds."),
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of FastAPI's `responses`: an example of each of these errors."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        code, message = _REASONS[status]
        example = {"error": {"code": code, "message": message}}
        described[status] = {
            "model": Error,
            "description": message.partition(":")[0].capitalize(),
            "content": {"application/json": {"example": example}},
        }
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
    return described


_BYTES = {"schema": {"type": "string", "format": "binary"}}


def body(*, several: bool) -> dict[str, Any]:
    """Of FastAPI's `openapi_extra`: images as a form's files, or one image's bytes."""
    field = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "minItems": 1,
        **({} if several else {"maxItems": 1}),
    }
    form = {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: field}}}
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    return {"requestBody": {"required": True, "content": {"multipart/form-data": form} | dict.fromkeys(kinds, _BYTES)}}
