"""`chiasm serve` by a real server: the predictor's own answers, one clear error for each bad input, a graceful end."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.data.images import read_image
from chiasm.errors import ChiasmError
from chiasm.explaining.explainer import open_explainer
from chiasm.predictor import Predictor, load
from chiasm.results.drawing import colour_of
from chiasm.results.explanation import visible
from chiasm.serving import schemas
from chiasm.serving.access import check_opening
from chiasm.serving.log import log_to_stderr, stop_logging
from chiasm.serving.served import Served, named
from running_server import LABELS, Running, classifier, finder, picture, running, until


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tasks = {task: finder(folder, task) for task in ("instances", "segment")}
    return {"fruit": classifier(folder), **tasks}


@pytest.fixture(scope="module")
def models(files: dict[str, str]) -> list[Served]:
    return [Served(name, path, device="cpu") for name, path in files.items()]


@pytest.fixture(scope="module")
def here(models: list[Served]) -> Iterator[Running]:
    with running(*models, max_mb=0.2, max_megapixels=0.5, cors=("https://example.org",)) as server:
        yield server


def _post(
    here: Running, data: bytes, path: str = "/v1/predict", kind: str = "image/png", **more: object
) -> httpx.Response:
    headers = {"Content-Type": kind, **more.pop("headers", {})}  # type: ignore[dict-item]
    return here.client.post(path, content=data, headers=headers, params=more)  # type: ignore[arg-type]


def _error(answer: httpx.Response) -> tuple[int, str]:
    failure = schemas.Error.model_validate(answer.json()).error
    assert "\n" not in failure.message
    assert failure.message.endswith((".", "?")), failure.message
    return answer.status_code, failure.code


def _number(here: Running, name: str) -> float:
    """One of the server's metrics; 0 as long as it has none of that name."""
    lines = (line.rpartition(" ") for line in here.client.get("/metrics").text.splitlines())
    return next((float(value) for found, _, value in lines if found == name), 0.0)


def _opened(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


# ------------------------------------------------------------------------------------------------------------- predict


def test_the_answers_are_the_predictors(here: Running, files: dict[str, str]) -> None:
    """Bytes and multipart, upright by EXIF, with each branch's classes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(1, (36, 60), "JPEG", exif=exif)
    (expected,) = load(files["fruit"], device="cpu")([read_image(data)])
    answers = [
        _post(here, data, kind=kind, top=3).json()
        for kind in ("image/jpeg", "image/x-whatever", "application/octet-stream")
    ]
    answers.append(here.client.post("/v1/predict", files={"images": ("../a/cat.jpg", data)}, params={"top": 3}).json())
    for answer in answers:
        schemas.Predictions.model_validate(answer)
        (result,) = answer["results"]
        assert (result["width"], result["height"]) == (60, 36)
        assert [one["label"] for one in result["top"]] == [label for label, _ in expected.top(3)]
        assert [one["score"] for one in result["top"]] == pytest.approx(
            [score for _, score in expected.top(3)], abs=1e-5
        )
        assert result["agreement"] == expected.agreement
        for branch, values in expected.branches.items():
            best = result["branches"][branch]
            assert len(best) == 3
            assert best[0]["label"] == expected.votes[branch]
            assert best[0]["probability"] == pytest.approx(values.max(), abs=1e-5)
    assert (answers[0]["model"], answers[0]["task"]) == ("fruit", "classify")
    assert [answer["results"][0]["source"] for answer in answers] == ["image"] * 3 + ["cat.jpg"]


def test_a_bad_image_among_good_ones_has_its_own_error(here: Running) -> None:
    parts = [("images", ("a.png", picture(1))), ("images", ("b.png", b"no image")), ("images", ("", picture(2)))]
    answer = here.client.post("/v1/predict", files=parts)
    assert answer.status_code == 200
    first, second, third = schemas.Predictions.model_validate(answer.json()).results
    assert isinstance(first, schemas.Classified)
    assert first.source == "a.png"
    assert isinstance(second, schemas.Failed)
    assert second.error.code == "image_unreadable"
    assert second.error.message.startswith("b.png: not a readable image")
    assert isinstance(third, schemas.Classified)
    assert third.source == "image 2"


def test_objects_masks_and_class_maps(here: Running) -> None:
    """Each with a layer of the image's size, and a legend whose colours are in it."""
    data = picture(3, (50, 40))
    found = _post(here, data, model="instances", threshold=0.01, overlay=True)
    (objects,) = schemas.Predictions.model_validate(found.json()).results
    assert isinstance(objects, schemas.Detected)
    assert objects.objects
    assert objects.overlay
    assert sum(entry.count or 0 for entry in objects.legend) == len(objects.objects)
    layer = _opened(objects.overlay).convert("RGBA")
    assert layer.size == (50, 40)
    assert 0 < np.asarray(layer)[..., 3].max() <= 255
    best = max(one.score for one in objects.objects)
    answer = _post(here, data, model="instances", threshold=best).json()
    (fewer,) = answer["results"]
    assert len(fewer["objects"]) < len(objects.objects)
    assert "overlay" not in fewer
    schemas.Predictions.model_validate(answer)  # which does not ask for one

    (regions,) = schemas.Predictions.model_validate(_post(here, data, model="segment", overlay=True).json()).results
    assert isinstance(regions, schemas.Segmented)
    assert regions.overlay
    pixels = np.asarray(_opened(regions.overlay).convert("RGBA"))
    assert pixels.shape == (40, 50, 4)
    assert (pixels[..., 3] == 255).all()
    for entry in regions.legend:
        colour = colour_of(LABELS.index(entry.label))
        assert entry.colour == "#" + bytes(colour).hex()
        assert (pixels[..., :3] == colour).all(-1).mean() == pytest.approx(entry.share)


def test_drawn_answers(here: Running) -> None:
    for model in ("fruit", "instances", "segment"):
        answer = _post(here, picture(4), model=model, headers={"Accept": "image/png, application/json;q=0.5"})
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(BytesIO(answer.content)).width >= 280
    parts = [("images", ("a", picture(1))), ("images", ("b", picture(2)))]
    before = _number(here, 'chiasm_batch_images_sum{lane="predict"}')
    answer = here.client.post("/v1/predict", files=parts, headers={"Accept": "image/png"})
    assert _error(answer) == (422, "one_image")
    assert _number(here, 'chiasm_batch_images_sum{lane="predict"}') == before  # no model was asked
    for accept in ("*/*", "application/json, image/png;q=0.5", "image/png;q=x", ""):
        answer = _post(here, picture(4), headers={"Accept": accept})
        assert answer.headers["content-type"] == "application/json", accept


def test_many_at_once_share_batches(here: Running) -> None:
    parts = [("images", (f"{i}.png", picture(i))) for i in range(40)]
    results = here.client.post("/v1/predict", files=parts).json()["results"]
    assert [result["source"] for result in results] == [f"{i}.png" for i in range(40)]
    alone = _post(here, picture(7)).json()["results"][0]
    assert alone["score"] == pytest.approx(results[7]["score"], abs=1e-5)
    images = _number(here, 'chiasm_batch_images_sum{lane="predict"}')
    batches = _number(here, 'chiasm_batch_images_count{lane="predict"}')
    assert images >= 41
    assert batches < images / 2


# ------------------------------------------------------------------------------------------------------------- explain


def test_explanations(here: Running, files: dict[str, str]) -> None:
    """Maps at their own resolution, layers over the image, of the class that is asked for."""
    data = picture(5, (64, 48))
    (expected,) = open_explainer(files["fruit"], device="cpu").explain(read_image(data), "image", label="pear")
    answer = _post(here, data, "/v1/explain", label="pear")
    told = schemas.Explanations.model_validate(answer.json())
    assert (told.model, told.task, told.width, told.height) == ("fruit", "classify", 64, 48)
    (one,) = told.explanations
    assert one.label == "pear"
    assert one.box is None
    assert one.scores == pytest.approx(expected.scores, abs=1e-5)
    assert one.region == pytest.approx(expected.region)
    assert one.overlap == pytest.approx(expected.overlap, abs=0.02)
    assert set(one.maps) == {"conv", "tokens", "fused"}
    assert set(one.layers) == {"conv", "tokens", "fused", "disagreement"}
    for name, url in one.maps.items():
        values = np.asarray(_opened(url))
        wanted = expected.map_of(name)
        assert values.shape == wanted.shape
        assert np.abs(values / 255 - wanted / max(wanted.max(), 1e-9)).max() < 0.01
    for name, url in one.layers.items():
        layer = np.asarray(_opened(url).convert("RGBA"))
        assert layer.shape == (48, 64, 4)
        if name != "disagreement":  # seen as far as there is something
            heat = visible(expected.over_image(expected.map_of(name)))
            assert np.abs((layer[..., 3] / 255) ** (1 / 0.6) - heat).max() < 0.02
    drawn = _post(here, data, "/v1/explain", branch="tokens", headers={"Accept": "image/png"})
    assert Image.open(BytesIO(drawn.content)).size == (64, 48)


def test_explanations_of_objects_and_regions(here: Running) -> None:
    for model, most in (("instances", 2), ("segment", 2)):
        answer = _post(here, picture(6, (50, 40)), "/v1/explain", model=model, top=2)
        told = schemas.Explanations.model_validate(answer.json())
        assert 0 < len(told.explanations) <= most
        for one in told.explanations:
            assert set(one.maps) == {"model", "fused"}
            assert (one.box is None) == (model == "segment")


# -------------------------------------------------------------------------------------------------------------- errors


def _bomb() -> bytes:
    """A PNG that says it has 400 megapixels."""
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    start = picture()[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    body = b"IDAT" + zlib.compress(bytes(1 << 16))
    return start + (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def _endless() -> bytes:
    """A progressive JPEG whose last pass over the pixels is repeated a hundred times."""
    data = picture(kind="JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * 100 + data[end:]


_FORM = "multipart/form-data; boundary=xyz"


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (b"", "image/png", (422, "no_image")),
        (b"GIF89a", "image/png", (422, "image_unreadable")),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", (422, "image_unreadable")),
        (picture()[:-200], "image/png", (422, "image_unreadable")),
        (picture(kind="ICO", size=(32, 32)), "image/x-icon", (422, "image_unreadable")),
        (_bomb(), "image/png", (422, "too_many_pixels")),
        (_endless(), "image/jpeg", (422, "image_unreadable")),
        (picture(size=(1000, 501), kind="JPEG", quality=5), "image/jpeg", (422, "too_many_pixels")),
        (b"/etc/passwd", "application/octet-stream", (422, "image_unreadable")),
        (b'{"url": "http://127.0.0.1/"}', "application/json", (415, "content_type")),
        (picture(), "text/plain", (415, "content_type")),
        (bytes(200_001), "image/png", (413, "body_too_large")),
        (b"hello", "multipart/form-data", (422, "form_damaged")),
        (b"hello", _FORM, (422, "form_damaged")),
        (b"--xyz\r\n\r\n", _FORM, (422, "form_damaged")),
        (b"--xyz--\r\n", _FORM, (422, "no_image")),
        (
            b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nabc\r\n--xyz--\r\n',
            _FORM,
            (422, "no_image"),
        ),
        (
            b'--xyz\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nabc\r\n',
            _FORM,
            (422, "form_damaged"),
        ),
        (b"--xyz\r\n" + b"x" * 10_000 + b": 1\r\n\r\n\r\n--xyz--\r\n", _FORM, (422, "form_damaged")),
        (b"--xyz\r\na: b\r\n\r\n\r\n" * 20 + b"--xyz--\r\n", _FORM, (422, "form_damaged")),
        (
            b'--xyz\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n\r\n' * 65 + b"--xyz--\r\n",
            _FORM,
            (422, "too_many_images"),
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_each_bad_body_has_one_clear_error(here: Running, data: bytes, kind: str, expected: tuple[int, str]) -> None:
    assert _error(_post(here, data, kind=kind)) == expected
    if expected[1] != "too_many_images":
        assert _error(_post(here, data, "/v1/explain", kind=kind)) == expected


def test_each_bad_setting_has_one_clear_error(here: Running) -> None:
    def explain(**query: object) -> tuple[int, str]:
        return _error(_post(here, picture(), "/v1/explain", **query))

    for query in ({"top": 0}, {"top": "x"}, {"threshold": 1.5}, {"threshold": "nan"}, {"overlay": "perhaps"}):
        assert _error(_post(here, picture(), **query)) == (422, "setting"), query
    unknown = _post(here, picture(), model="friut")
    assert _error(unknown) == (404, "unknown_model")
    assert "did you mean fruit?" in unknown.json()["error"]["message"]
    assert explain(label="Pear") == (422, "unknown_label")
    assert explain(branch="wood", headers={"Accept": "image/png"}) == (422, "unknown_branch")
    assert _error(here.client.post("/v1/explain", files=[("images", ("a", picture()))] * 2)) == (422, "one_image")
    assert _error(here.client.get("/v1/predict")) == (405, "method")
    for path in ("/nothing", "/docs", "/redoc", "/page/../served.py", "/page/%2e%2e%2fserved.py", "/page/nothing.js"):
        assert _error(here.client.get(path)) == (404, "not_found"), path


def test_a_body_is_counted_while_it_comes(here: Running) -> None:
    """No Content-Length says how much there will be, and no more than the limit is ever held."""
    held = []

    def long() -> Iterator[bytes]:
        for number in range(200):
            yield bytes(1 << 16)
            time.sleep(0.02 if number < 4 else 0)
            held.append(here.service._held.bytes)

    answer = here.client.post("/v1/predict", content=long(), headers={"Content-Type": "image/png"})
    assert _error(answer) == (413, "body_too_large")
    assert 0 < max(held) <= 200_000
    form = {"images": ("a.png", bytes(200_001))}
    assert _error(here.client.post("/v1/predict", files=form)) == (413, "body_too_large")
    assert here.service._held.bytes == 0


def test_a_line_of_pixels_is_no_load(here: Running) -> None:
    """Enlarged until it is as wide as the network's input it would not fit into any memory."""
    file = BytesIO()
    Image.new("L", (400_000, 1)).save(file, "PNG")
    start = time.monotonic()
    for model in ("fruit", "instances", "segment"):
        answer = _post(here, file.getvalue(), model=model, overlay=True)
        assert answer.status_code == 200, answer.text
    assert _post(here, file.getvalue(), "/v1/explain").status_code == 200
    assert time.monotonic() - start < 10


# ------------------------------------------------------------------------------------------- what stands around answers


def test_models_and_conditions(here: Running) -> None:
    told = schemas.ModelList.model_validate(here.client.get("/v1/models").json())
    assert [(model.name, model.task, model.default) for model in told.models] == [
        ("fruit", "classify", True),
        ("instances", "instances", False),
        ("segment", "segment", False),
    ]
    assert told.models[0].branches == ["conv", "tokens"]
    assert not told.models[1].branches
    assert told.models[0].labels == list(LABELS)
    assert told.models[0].image_size == [32, 32]
    assert (told.limits.bytes, told.limits.pixels, told.limits.images) == (200_000, 500_000, 64)
    assert here.client.get("/health").json() == {"status": "ok"}
    assert here.client.get("/ready").json() == {"status": "ready"}


def test_heads_alone_and_what_browsers_have_already(here: Running) -> None:
    for path in ("/health", "/ready", "/", "/page/page.js"):
        head, whole = here.client.head(path), here.client.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == str(len(whole.content)), path
    for path in ("/", "/page/page.js"):
        tag = here.client.get(path).headers["etag"]
        for known in (tag, f'"other", W/{tag}'):
            again = here.client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert here.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_browsers_are_kept_safe(here: Running) -> None:
    for path in ("/", "/page/page.js", "/nothing", "/v1/models"):
        headers = here.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    page = here.client.get("/").text
    assert "<title>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    friend = here.client.get("/v1/models", headers={"Origin": "https://example.org"})
    assert friend.headers["access-control-allow-origin"] == "https://example.org"
    foe = here.client.get("/health", headers={"Origin": "https://evil.org"})
    assert "access-control-allow-origin" not in foe.headers


def test_pages_of_other_sites_are_not_answered(here: Running, models: list[Served]) -> None:
    """Without a key, neither what they send here nor under a name of theirs that leads here."""
    port = here.url.rpartition(":")[2]
    for host in ("evil.org", f"evil.org:{port}", "127.0.0.1.evil.org", "192.168.1.5", "[::1", "a@b@c", ""):
        for path in ("/", "/v1/models", "/metrics", "/openapi.json"):
            assert _error(here.client.get(path, headers={"Host": host})) == (403, "host"), host
    for host in (f"localhost:{port}", "LOCALHOST", f"127.0.0.1:{port}", f"[::1]:{port}", "127.0.0.1"):
        for origin in (f"http://{host}", "https://example.org"):
            assert _post(here, picture(), headers={"Host": host, "Origin": origin}).status_code == 200, host
    for origin in ("https://evil.org", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1", "http://example.org"):
        assert _error(_post(here, picture(), headers={"Origin": origin})) == (403, "origin"), origin
    assert 'chiasm_rejected_total{code="origin"}' in here.client.get("/metrics").text
    with running(models[0], key="open-sesame") as server:
        headers = {"Host": "evil.org", "Origin": "https://evil.org", "X-API-Key": "open-sesame"}
        assert _post(server, picture(), headers=headers).status_code == 200


def test_openapi_describes_every_route(here: Running) -> None:
    api = here.client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/v1/predict", "/v1/explain", "/v1/models", "/health", "/ready", "/metrics"}
    predict = api["paths"]["/v1/predict"]["post"]
    assert {"multipart/form-data", "image/jpeg", "application/octet-stream"} <= set(predict["requestBody"]["content"])
    assert {"200", "401", "403", "404", "413", "415", "422", "429", "500", "503", "504"} <= set(predict["responses"])
    for route in api["paths"].values():
        (described,) = route.values()
        assert {"200", "403", "500"} <= set(described["responses"])
        for status in {"429", "503"} & set(described["responses"]):
            assert "Retry-After" in described["responses"][status]["headers"]
    for status, response in predict["responses"].items():
        if status != "200":
            schemas.Error.model_validate(response["content"]["application/json"]["example"])
    schemas.Predictions.model_validate(api["components"]["schemas"]["Predictions"]["example"])
    assert "image/png" in predict["responses"]["200"]["content"]


def test_metrics(here: Running) -> None:
    _post(here, b"")
    here.client.get("/nobody/knows/this")
    text = here.client.get("/metrics").text
    assert 'chiasm_requests_total{path="/v1/predict",status="422"}' in text
    assert 'chiasm_requests_total{path="other",status="404"}' in text
    assert 'chiasm_rejected_total{code="no_image"}' in text
    assert "chiasm_waiting_images 0.0" in text
    assert "nobody" not in text
    assert "process_resident_memory_bytes" in text


def test_images_are_counted_one_by_one(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a form that are answered, and those that are not; none that was drawn for nobody."""
    answered, refused = 'chiasm_images_total{model="fruit"}', 'chiasm_rejected_total{code="image_unreadable"}'
    before = [_number(here, name) for name in (answered, refused)]
    parts = [("images", ("a", data)) for data in (picture(1), b"none", picture(2), b"neither")]
    assert here.client.post("/v1/predict", files=parts).status_code == 200
    assert [_number(here, name) for name in (answered, refused)] == [before[0] + 2, before[1] + 2]
    with monkeypatch.context() as during:
        during.setattr("chiasm.serving.app.result_json", None)  # the server's own mistake
        assert _error(_post(here, picture())) == (500, "internal")
    assert _number(here, answered) == before[0] + 2


def test_the_log_names_no_file_and_holds_no_image(models: list[Served], capsys: pytest.CaptureFixture[str]) -> None:
    with running(models[0], quiet=False) as server:
        server.client.post("/v1/predict", files={"images": ("secret.png", picture())})
        server.client.post("/v1/predict", files={"images": ("secret.png", b"broken")})
        server.client.get("/secret.png")
    text = capsys.readouterr().err
    first, second, third = map(json.loads, text.splitlines())
    assert "secret" not in text
    assert (first["status"], first["path"], first["model"], first["images"]) == (200, "/v1/predict", "fruit", 1)
    assert first["ms"] > 0
    assert first["batch"] == 1
    assert first["time"].endswith("+00:00")
    assert (second["status"], second["code"]) == (422, "image_unreadable")
    assert (third["status"], third["path"]) == (404, "other")


def test_a_mistake_of_the_servers_own_is_one_answer_and_one_line(
    models: list[Served], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(models[0]) as server:
        predictor = server.service.models.get(None).predictor
        for broken, name in ((predictor, "answer_seen"), (predictor, "look"), (server.service, "limits")):
            with monkeypatch.context() as during:
                during.setattr(broken, name, None)
                answer = _post(server, picture())
                assert _error(answer) == (500, "internal")
                assert answer.headers["x-content-type-options"] == "nosniff"
            assert _post(server, picture()).status_code == 200
        assert 'chiasm_requests_total{path="/v1/predict",status="500"} 3.0' in server.client.get("/metrics").text
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["the model failed", "decoding failed", "a request failed"]
    assert all(line["level"] == "error" and "Error" in line["traceback"] for line in lines)


# ---------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_asked_for(models: list[Served]) -> None:
    with running(models[0], key="open sesame".replace(" ", "-")) as server:
        for path in ("/health", "/ready", "/", "/page/page.js"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            refused = server.client.get(path)
            assert _error(refused) == (401, "key")
            assert refused.headers["www-authenticate"] == "Bearer"
            for wrong in ({"X-API-Key": "open-sesam"}, {"Authorization": "Bearer ü"}, {"Authorization": "open-sesame"}):
                encoded = {name: value.encode("latin-1") for name, value in wrong.items()}
                assert server.client.get(path, headers=encoded).status_code == 401  # type: ignore[arg-type]
            assert server.client.get(path, headers={"X-API-Key": "open-sesame"}).status_code == 200
            assert server.client.get(path, headers={"Authorization": "Bearer open-sesame"}).status_code == 200
        assert _error(_post(server, picture(), top=0)) == (401, "key")
        api = server.client.get("/openapi.json", headers={"X-API-Key": "open-sesame"}).json()
        example = api["paths"]["/v1/models"]["get"]["responses"]["401"]["content"]["application/json"]["example"]
        assert example == server.client.get("/v1/models").json()
        assert len(api["paths"]["/v1/predict"]["post"]["security"]) == 2


def test_no_network_without_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(
            ChiasmError, match="opens the server to the network: set a key, such as 'export CHIASM_API_KEY"
        ):
            check_opening(host, None)
        check_opening(host, "0123456789")
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_opening(host, None)
    for weak in ("short", "with a space", "schlüssel-lang"):
        with pytest.raises(ChiasmError, match="expected 8 or more"):
            check_opening("127.0.0.1", weak)


# ---------------------------------------------------------------------------------------------------------- the command


def test_names_of_models(tmp_path: Path) -> None:
    run = tmp_path / "photos-1"
    run.mkdir()
    refs = [str(run), str(run / "model.safetensors") + "", "b/cats.safetensors", "x=a/b=c.safetensors", "resnet18"]
    assert named([refs[0]]) == {"photos-1": refs[0]}
    assert named([refs[1]]) == {"photos-1": refs[1]}
    assert named(refs[2:]) == {"cats": refs[2], "x": "a/b=c.safetensors", "resnet18": "resnet18"}
    assert named(["resnet18.a1_in1k"]) == {"resnet18.a1_in1k": "resnet18.a1_in1k"}
    assert named(["a/b=c.safetensors"]) == {"b=c": "a/b=c.safetensors"}
    with pytest.raises(ChiasmError, match="two models would be called 'cats'"):
        named(["a/cats.safetensors", "b/cats.safetensors"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "which model"),
        (["m", "--port", "70000"], "port is 70000"),
        (["m", "--batch", "0"], "batch is 0"),
        (["m", "--max-mb", "0"], "max_mb is 0"),
        (["m", "--timeout", "0"], "timeout is 0"),
        (["m", "--wait-ms", "1e13"], "wait_ms is 1e+13"),
        (["m", "--queue", "10000000"], "queue is 1e+07"),
        (["m", "--threshold", "2"], "threshold is 2"),
        (["m", "--cors", "example.org"], "cors is 'example.org'"),
        (["m", "--host", "0.0.0.0"], "opens the server to the network"),
        (["a=m", "a=n"], "two models would be called 'a'"),
        (["no/model.safetensors", "--port", "0"], "no such file"),
        (["m", "--host", "no-such-host.invalid", "--api-key", "12345678"], "cannot listen at no-such-host.invalid"),
    ],
)
def test_misuse_is_told_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CHIASM_API_KEY", raising=False)
    assert main(["serve", *flags]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_port_that_is_taken(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", files["fruit"], "--port", str(taken.getsockname()[1])]) == 2
    assert "--port may be free" in capsys.readouterr().err


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("chiasm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ChiasmError, match=r"serving needs fastapi: pip install 'chiasm\[serve\]'"):
        chiasm.serve(models=["m"])


def test_a_damaged_model_ends_the_server(tmp_path: Path) -> None:
    from chiasm.model_file import load_model, save_model

    model, info = load_model(classifier(tmp_path))
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    save_model(tmp_path / "fruit.safetensors", model, info)
    with pytest.raises(ChiasmError, match="not finite"):
        chiasm.serve(models=[str(tmp_path / "fruit.safetensors")], port=0, quiet=True)


def test_images_too_large_for_the_machine_end_the_server(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory.\nAnd a lot more")

    monkeypatch.setattr(Predictor, "answer_seen", scarce)
    with pytest.raises(ChiasmError, match=r"image of 32 x 32 pixels here \(.*memory\); a smaller --image-size may do"):
        chiasm.serve(models=[files["fruit"]], port=0, quiet=True)


def test_damaged_exif_is_not_logged(files: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow warns of each of its tags."""
    data = picture()
    tags = b"".join(struct.pack("<HHII", tag, 7, 100_000, 8) for tag in range(300, 1300))
    exif = b"II*\0" + struct.pack("<IH", 8, 1000) + tags + bytes(4)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    data = data[:33] + chunk + data[33:]
    (tmp_path / "tags.png").write_bytes(data)
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        assert main(["predict", files["fruit"], str(tmp_path / "tags.png"), "--out", str(tmp_path / "out")]) == 0
        warnings.resetwarnings()
        handler = log_to_stderr(quiet=True)
        try:
            read_image(data)
        finally:
            stop_logging(handler)
    assert "Tag data" not in capfd.readouterr().err
    assert not [warning for warning in seen if "PIL" in warning.filename]


def test_answers_that_are_being_sent_have_their_time(models: list[Served]) -> None:
    with running(models[0], timeout=17.5) as server:
        assert server.server.config.timeout_graceful_shutdown == 18


# A decoder that does not come back, as Pillow's on some damaged images; the end of the process waits half a second.
_STUCK = """
import sys, time
import chiasm.serving.server, chiasm.serving.service
chiasm.serving.service.decode = lambda *_: time.sleep(60)
chiasm.serving.server._THREADS = 0.5
from chiasm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("timeout", "pause", "code"), [("0.5", 0.02, 0), ("60", 0.5, 128 + signal.SIGINT)])
def test_the_process_ends_though_a_thread_does_not(
    files: dict[str, str], timeout: str, pause: float, code: int
) -> None:
    """By itself once nobody waits, where two signals close together are one; at once by a second signal."""
    words = [sys.executable, "-c", _STUCK, "serve", files["fruit"], "--port", "0", "--timeout", timeout, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            address = process.stdout.readline().split(" at ")[1].split(";")[0].removeprefix("http://").split(":")
            with socket.create_connection((address[0], int(address[1]))) as client:
                data = picture()
                lines = ("POST /v1/predict HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}")
                client.sendall("\r\n".join([*lines, "", ""]).encode() + data)
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                time.sleep(pause)
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == code
                assert b" 504 " in client.recv(1000) if code == 0 else True
            events = [json.loads(line)["event"] for line in process.stderr]
            assert [event[:23] for event in events] == (["a thread does not end: "] if code == 0 else [])
        finally:
            process.kill()


def test_sigterm_finishes_what_was_accepted(files: dict[str, str]) -> None:
    """An image is on its way when the signal comes: it is answered, newcomers are not, and the command ends with 0."""
    words = [sys.executable, "-m", "chiasm", "serve", files["fruit"], "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        assert told.startswith("chiasm serves fruit (classify) at http://127.0.0.1:")
        url = told.split(" at ")[1].split(";")[0]
        data = picture()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
            lines = ("POST /v1/predict HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}")
            slow.sendall("\r\n".join([*lines, "", ""]).encode() + data[:100])
            until(lambda: httpx.get(f"{url}/ready").status_code == 200)
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert httpx.get(f"{url}/health").status_code == 200
            late = httpx.post(f"{url}/v1/predict", content=data)
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "stopping"
            slow.sendall(data[100:])
            assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert all(json.loads(line)["event"] == "request" for line in process.stderr)
