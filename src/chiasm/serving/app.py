"""The routes: what a request says becomes a call of the service, what the service says an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from chiasm import __version__
from chiasm.data.images import read_image
from chiasm.data.transforms import to_pillow
from chiasm.errors import UnknownNameError
from chiasm.results import Detections, Explanation
from chiasm.results.explanation import FUSED
from chiasm.serving import metrics, schemas
from chiasm.serving.access import HereAlone, key_check
from chiasm.serving.answers import explanation_json, explanation_picture, result_json, result_picture
from chiasm.serving.refusals import Refusal
from chiasm.serving.service import Answered, Service
from chiasm.serving.uploads import Upload
from chiasm.serving.watch import Entry, Watch

PAGE = Path(__file__).with_name("page")
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}

_Model = Annotated[str | None, Query(description="a model's name; default: the first", examples=["photos"])]


def create_app(service: Service, *, key: str | None = None, cors: list[str] | None = None) -> FastAPI:
    """The ASGI application of a service.

    Args:
        service: started by whoever runs the application.
        key: what requests must show; None lets all pass that are sent to this machine's own name, and by no page of
            another site.
        cors: origins whose pages may read the answers, such as 'https://example.org'.
    """
    app = FastAPI(
        title="chiasm",
        version=__version__,
        description="What models say of images, and what in an image they say it for.",
        # FastAPI's own pages load their scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        responses=schemas.errors(*([] if key else [403]), 500),
    )
    keyed = [Depends(key_check(key))] if key else []
    app.include_router(_answers(service), dependencies=keyed)
    app.include_router(_conditions(service, keyed))
    app.include_router(_page())

    @app.get("/openapi.json", include_in_schema=False, dependencies=keyed)
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        _entry(request).code = error.code
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def unfit(request: Request, error: RequestValidationError) -> Response:
        wrong = error.errors()[0]
        where = ".".join(str(part) for part in wrong["loc"][1:])
        return await refused(request, Refusal(422, "setting", f"{where}: {wrong['msg'].lower()}."))

    @app.exception_handler(HTTPException)
    async def missed(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method"}.get(error.status_code, "request")
        response = await refused(request, Refusal(error.status_code, code, f"{str(error.detail).lower()}."))
        response.headers.update(error.headers or {})
        return response

    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type"],
            expose_headers=["Retry-After"],
        )
    if key is None:
        app.add_middleware(HereAlone, origins=cors or [])
    app.add_middleware(Watch, metrics=service.metrics)
    return app


def _answers(service: Service) -> APIRouter:
    """/v1: predictions, explanations, the models."""
    router = APIRouter(responses=schemas.errors(401))
    refusals = schemas.errors(404, 408, 413, 415, 422, 429, 503, 504)
    picture: dict[str, Any] = {
        "content": {"image/png": {}},
        "description": "the answer, or with 'Accept: image/png' it drawn",
    }

    @router.post(
        "/v1/predict",
        summary="What is in images",
        responses={200: {"model": schemas.Predictions, **picture}, **refusals},
        openapi_extra=schemas.body(several=True),
    )
    async def predict(
        request: Request,
        model: _Model = None,
        top: Annotated[int, Query(ge=1, le=1000, description="classes listed (classifiers)")] = 5,
        threshold: Annotated[
            float | None, Query(ge=0, le=1, description="least score of an object (detectors)")
        ] = None,
        overlay: Annotated[bool, Query(description="add a see-through picture of what was found")] = False,
    ) -> Response:
        entry = _entry(request)
        with service.accepted():
            served = service.models.get(model)
            entry.model = served.name
            drawn = _wants_picture(request)

            def render(answered: Answered, upload: Upload) -> Any:
                result = answered.result
                if isinstance(result, Detections):
                    result = result.above(service.threshold if threshold is None else threshold)
                if drawn:
                    return result_picture(result, to_pillow(read_image(upload.data, name=upload.name)), top)
                return result_json(result, answered.size, top=top, overlay=overlay)

            light = served.info.task == "classify" and not drawn
            answers = await service.predict(request, served, entry, render, light=light, alone=drawn)
            failures = [answer for _, answer in answers if isinstance(answer, Refusal)]
            if len(failures) == len(answers):
                raise failures[0]
            for failure in failures:
                service.metrics.rejected(failure.code)
            if drawn:
                return Response(answers[0][1], media_type="image/png")
            results = [
                {"source": name, "error": answer.to_dict()} if isinstance(answer, Refusal) else answer
                for name, answer in answers
            ]
            return JSONResponse({"model": served.name, "task": served.info.task, "results": results})

    @router.post(
        "/v1/explain",
        summary="What in an image spoke for the answer",
        responses={200: {"model": schemas.Explanations, **picture}, **refusals},
        openapi_extra=schemas.body(several=False),
    )
    async def explain(
        request: Request,
        model: _Model = None,
        label: Annotated[str | None, Query(description="the class to explain; default: the predicted one")] = None,
        top: Annotated[int, Query(ge=1, le=10, description="objects or classes explained (not of classifiers)")] = 3,
        branch: Annotated[str, Query(description="whose map is drawn: conv, tokens, model or fused")] = FUSED,
    ) -> Response:
        entry = _entry(request)
        with service.accepted():
            served = service.models.get(model)
            entry.model = served.name
            labels = served.info.labels
            if label is not None and label not in labels:
                raise Refusal(422, "unknown_label", str(UnknownNameError("class", label[:100], labels)))
            drawn = _wants_picture(request)

            def render(explanations: list[Explanation], size: tuple[int, int], upload: Upload) -> Response:
                if not drawn:
                    told = [explanation_json(one, labels) for one in explanations]
                    about = {"model": served.name, "task": served.info.task, "height": size[0], "width": size[1]}
                    return JSONResponse({**about, "explanations": told})
                if not explanations:
                    raise Refusal(422, "nothing_found", f"{upload.name}: nothing was found, so nothing is explained.")
                known = (*explanations[0].branches, FUSED)
                if branch not in known:
                    raise Refusal(422, "unknown_branch", str(UnknownNameError("branch", branch[:100], known)))
                image = to_pillow(read_image(upload.data, name=upload.name))
                return Response(explanation_picture(explanations[0], image, branch), media_type="image/png")

            return await service.explain(request, served, entry, label, top, render)

    @router.get(
        "/v1/models", summary="The models here", responses={200: {"model": schemas.ModelList}, **schemas.errors(503)}
    )
    async def models() -> Response:
        with service.accepted():
            limits = service.limits
            listed = [
                {
                    "name": served.name,
                    "task": served.info.task,
                    "architecture": served.info.architecture,
                    "labels": list(served.info.labels),
                    "branches": list(served.branches),
                    "image_size": list(served.info.preprocess.size),
                    "default": index == 0,
                }
                for index, served in enumerate(service.models)
            ]
            allowed = {"bytes": limits.bytes, "pixels": limits.pixels, "images": limits.images}
            return JSONResponse({"models": listed, "limits": allowed})

    return router


def _conditions(service: Service, keyed: list[Any]) -> APIRouter:
    """How the server is."""
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether the server lives", responses={200: {"model": schemas.State}})
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @router.head("/ready", include_in_schema=False)
    @router.get(
        "/ready",
        summary="Whether the server takes requests",
        responses={200: {"model": schemas.State}, **schemas.errors(503)},
    )
    async def ready() -> Response:
        if service.state != "ready":
            raise Refusal(503, service.state, f"the server is {service.state}.", retry_after=2)
        return JSONResponse({"status": "ready"})

    @router.get(
        "/metrics",
        summary="Numbers for Prometheus",
        dependencies=keyed,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **schemas.errors(401)},
    )
    async def numbers() -> Response:
        return Response(service.metrics.text(), media_type=metrics.TYPE)

    return router


def _page() -> APIRouter:
    """The page and its files; names that are not its files' are no paths."""
    router = APIRouter(include_in_schema=False)
    files = {path.name for path in PAGE.iterdir() if path.suffix in _TYPES} - {"index.html"}

    def send(request: Request, name: str) -> Response:
        path, fresh = PAGE / name, {"Cache-Control": "no-cache"}
        response = FileResponse(path, stat_result=path.stat(), media_type=_TYPES[path.suffix], headers=fresh)
        tag = response.headers["etag"]
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"ETag": tag, **fresh})
        return response

    @router.head("/")
    @router.get("/")
    async def index(request: Request) -> Response:
        return send(request, "index.html")

    @router.head("/page/{name}")
    @router.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "Not Found")
        return send(request, name)

    return router


def _entry(request: Request) -> Entry:
    return request.state.entry


def _wants_picture(request: Request) -> bool:
    """Whether the client would rather have a PNG than JSON."""
    shares = {"image/png": 0.0, "application/json": 0.0}
    for part in request.headers.get("accept", "").split(","):
        kind, *options = (word.strip().lower() for word in part.split(";"))
        share = next((option[2:] for option in options if option.startswith("q=")), "1")
        if kind in shares:
            shares[kind] = float(share) if share.replace(".", "", 1).isdecimal() else 0.0
    return shares["image/png"] > shares["application/json"]
