"""Whatever is sent, the server answers as its OpenAPI says, never with a 5xx, and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from chiasm.data.images import read_image
from chiasm.serving import schemas
from chiasm.serving.served import Served
from running_server import Running, classifier, finder, picture, running
from serve_damage import KINDS, damaged

_QUICK = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
SOUND = [picture(i, (9 + i, 7), kind) for i, kind in enumerate(KINDS)]
MUTATED = st.builds(damaged, st.sampled_from(SOUND), st.randoms(use_true_random=False))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("models")
    files = {"fruit": classifier(folder), "map": finder(folder, "segment"), "things": finder(folder, "instances")}
    models = [Served(name, file, device="cpu") for name, file in files.items()]
    with running(*models, max_mb=1, max_megapixels=2) as made:
        yield made
        assert made.client.get("/ready").status_code == 200
        assert made.client.post("/v1/predict", content=picture()).status_code == 200


@pytest.fixture(scope="module")
def api(server: Running) -> schemathesis.BaseSchema:
    schemathesis.openapi.format("binary", st.one_of(st.sampled_from(SOUND), MUTATED, st.binary(max_size=40)))
    for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
        schemathesis.openapi.media_type(kind, st.one_of(st.sampled_from(SOUND), MUTATED))
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_whatever_the_description_allows_or_forbids(api: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    """Requests made of the OpenAPI, those that it allows and those that it does not, to models of each kind: statuses,
    types and bodies of the answers are those that it names."""
    strategy = st.one_of(*(result.ok().as_strategy(mode) for result in api.get_all_operations()))
    seen: set[tuple[int, str | None]] = set()

    @_QUICK
    @given(case=strategy, name=st.sampled_from([None, "fruit", "map", "things"]))
    def check(case: schemathesis.Case, name: str | None) -> None:
        if name and case.method == "POST":
            case.query = {**(case.query or {}), "model": name}
        answer = case.call()
        seen.add((answer.status_code, name))
        case.validate_response(
            answer,
            checks=[
                not_a_server_error,
                status_code_conformance,
                content_type_conformance,
                response_schema_conformance,
            ],
        )

    check()
    for name in ("fruit", "map", "things"):
        assert (200 if mode is GenerationMode.POSITIVE else 422, name) in seen


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict?model=map&overlay=true", "/v1/explain"])
def test_damaged_images(server: Running, path: str) -> None:
    """Each is answered, or refused by name."""
    codes: set[str] = set()

    @settings(_QUICK, max_examples=12 if "explain" in path else 30)
    @given(images=st.lists(MUTATED, min_size=1, max_size=3), form=st.booleans())
    def check(images: list[bytes], form: bool) -> None:
        if form:
            files = [("images", (f"{i}.png", image)) for i, image in enumerate(images)]
            answer = server.client.post(path, files=files[:1] if "explain" in path else files)
        else:
            answer = server.client.post(path, content=images[0], headers={"Content-Type": "image/png"})
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 422:
            codes.add(schemas.Error.model_validate(answer.json()).error.code)
        else:
            (schemas.Explanations if "explain" in path else schemas.Predictions).model_validate(answer.json())

    check()
    assert codes <= {"image_unreadable", "too_many_pixels", "no_image"}
    assert "image_unreadable" in codes


@_QUICK
@given(
    data=st.binary(max_size=300),
    kind=st.sampled_from(
        ["multipart/form-data; boundary=b", 'multipart/form-data; boundary="b"', "multipart/form-data"]
    ),
    cut=st.integers(0, 400),
)
def _forms(server: Running, data: bytes, kind: str, cut: int) -> None:
    part = (
        b'--b\r\nContent-Disposition: form-data; name="images"; filename="\xff.png"\r\n\r\n' + data + b"\r\n--b--\r\n"
    )
    answer = server.client.post("/v1/predict", content=part[:cut] + data, headers={"Content-Type": kind})
    assert answer.status_code == 422
    schemas.Error.model_validate(answer.json())


def test_damaged_forms(server: Running) -> None:
    _forms(server)


def test_unusual_images_are_answered_as_by_the_predictor(server: Running) -> None:
    """Grey, 16 bits, palette with transparency, CMYK, several frames: sound, if rare."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    clear = image.convert("P")
    clear.info["transparency"] = 0
    predictor = server.service.models.get("fruit").predictor
    for made, kind, more in (
        (image.convert("L"), "PNG", {}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (clear, "PNG", {}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("RGBA"), "WEBP", {"lossless": True}),
        (image.convert("1"), "TIFF", {}),
        (image.convert("P"), "GIF", {"save_all": True, "append_images": [Image.new("P", image.size)]}),
    ):
        file = BytesIO()
        made.save(file, kind, **more)
        answer = server.client.post("/v1/predict", content=file.getvalue())
        assert answer.status_code == 200, (kind, answer.text)
        (expected,) = predictor([read_image(file.getvalue())])
        (result,) = answer.json()["results"]
        assert (result["width"], result["height"]) == (30, 20), kind
        told = {one["label"]: one["score"] for one in result["top"]}
        assert told == pytest.approx(dict(expected.top(4)), abs=1e-5), kind
