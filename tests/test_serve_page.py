"""The page of `chiasm serve` in a real browser, against a real server: what a person sees, types and hears.

Screenshots are kept in the folder that the variable CHIASM_SCREENSHOTS names, else in pytest's own.
"""

from __future__ import annotations

import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="Playwright is not installed (extra dev)")
pytest.importorskip("fastapi", reason="FastAPI is not installed (extra serve)")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from chiasm.results.drawing import colour_of
from chiasm.results.masks import decode_mask
from chiasm.serving.served import Served
from running_server import LABELS, Running, classifier, finder, picture, running

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here (Debian's package chromium)")

ASK = "What did each branch see?"
LIMITS = {"max_mb": 0.2, "max_megapixels": 0.25}
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 320, "height": 640}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A classifier of two branches, a detector with masks and a segmenter behind one server."""
    folder = tmp_path_factory.mktemp("models")
    models = [Served("fruit", classifier(folder), device="cpu")]
    models += [Served(task, finder(folder, task), device="cpu") for task in ("instances", "segment")]
    with running(*models, **LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser, served: Running) -> Iterator[Callable[..., Page]]:
    """Opens the page. At the end: nothing was asked of anybody but the server, and the console has no complaint but
    the browser's own line about an answer that is an error, which the page shows itself."""
    opened = []
    complaints: list[str] = []
    asked: list[str] = []

    def go(url: str = "", viewport: dict[str, int] | None = None, **options: Any) -> Page:
        context = browser.new_context(viewport=viewport or DESKTOP, **options)
        context.set_default_timeout(15_000)
        opened.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.goto(url or served.url)
        return page

    yield go
    for context in opened:
        context.close()
    own = re.compile(r"http://127\.0\.0\.1:\d+/|blob:http://127\.0\.0\.1:\d+/|data:image/png")
    assert [url for url in asked if not own.match(url)] == []
    known = r"Failed to load resource: (the server responded with a status of 4\d\d|net::ERR_INTERNET_DISCONNECTED)"
    assert [line for line in complaints if not re.match(known, line)] == []


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("CHIASM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file(name: str, data: bytes | None = None, kind: str = "image/png") -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": picture(3, (90, 70)) if data is None else data}


def _give(page: Page, *files: dict[str, Any]) -> Locator:
    """Choose files; their cards."""
    page.set_input_files("#files", list(files))
    return page.locator("article")


def _ask(server: Running, file: dict[str, Any], route: str = "predict", **query: Any) -> dict[str, Any]:
    """What the API says of a file."""
    images = {"images": (file["name"], file["buffer"], file["mimeType"])}
    answer = server.client.post(f"/v1/{route}", params=query, files=images).json()
    return answer["explanations"] if route == "explain" else answer["results"][0]


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f}%"


def _canvas(card: Locator) -> np.ndarray:
    """The RGBA pixels of the layer of masks."""
    url = card.locator("canvas").evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(BytesIO(b64decode(url.partition(",")[2]))))


# --------------------------------------------------------------------------------------------------------- a classifier


def test_a_picture_is_answered(visit: Callable[..., Page], served: Running, shots: Path) -> None:
    page, file = visit(), _file("basket.png")
    page.screenshot(path=shots / "empty.png")
    card = _give(page, file)
    answer = _ask(served, file)
    expect(card.locator(".verdict")).to_have_text(f"{answer['label']} {_percent(answer['score'])}")
    expect(card.locator(".of")).to_have_text("basket.png 90 × 70 pixels")
    # Every label with its number, names as they are and not as HTML, bars as long as the number says.
    rows = card.locator(".labels button")
    shown = [row.locator(".line").inner_text().split("\n") for row in rows.all()]
    assert shown == [[entry["label"], _percent(entry["score"])] for entry in answer["top"]]
    assert {row[0] for row in shown} == set(LABELS)
    length = "bar => bar.getBoundingClientRect().width / bar.parentNode.offsetWidth"
    assert rows.first.locator(".track i").evaluate(length) == pytest.approx(answer["score"], abs=0.01)
    # A mark on each bar for each branch, and the votes in words.
    assert card.locator(".track b").count() == 2 * len(LABELS)
    votes = {name: votes[0] for name, votes in answer["branches"].items()}
    assert answer["agreement"] is True
    expect(card.locator(".votes p")).to_have_text(f"Both branches vote for {answer['label']}.")
    for name in ("conv", "tokens"):
        vote = f"{name.capitalize()}: {votes[name]['label']}{_percent(votes[name]['probability'])}"
        expect(card.locator(".votes li", has_text=name.capitalize())).to_have_text(vote)
    expect(page.get_by_role("status")).to_contain_text(f"basket.png: {answer['label']}, {_percent(answer['score'])}.")
    page.screenshot(path=shots / "classifier.png", full_page=True)


def test_branches_that_disagree(visit: Callable[..., Page], served: Running) -> None:
    for seed in range(200):
        file = _file("odd.png", picture(seed, (8 + seed, 9)))
        if _ask(served, file)["agreement"] is False:
            break
    else:
        pytest.fail("the branches agree on everything")
    votes = _give(visit(), file).locator(".votes")
    expect(votes.locator("p")).to_have_text("The branches disagree.")
    expect(votes).to_have_class("votes apart")


def test_heat_maps(visit: Callable[..., Page], served: Running, shots: Path) -> None:
    page, file = visit(), _file("basket.png")
    card = _give(page, file)
    card.get_by_role("button", name=ASK).click()
    (told,) = _ask(served, file, "explain")
    group = card.get_by_role("group", name=f"What spoke for {told['subject']}")
    radios = group.get_by_role("radio")
    expect(radios).to_have_count(4)
    assert [radio.get_attribute("value") for radio in radios.all()] == ["conv", "tokens", "fused", "disagreement"]
    heat = card.locator(".heat")
    for name, layer in told["layers"].items():
        group.get_by_role("radio", name=name.capitalize()).click()
        expect(heat).to_have_attribute("src", layer)
        expect(heat).to_have_attribute("alt", f"Heat map {name.capitalize()} for {told['subject']}")
    page.screenshot(path=shots / "heat_map.png", full_page=True)
    expect(card.locator(".heats")).to_contain_text("The network saw the middle of the picture alone.")
    shares = f"They share {_percent(told['overlap'])} of what they look at."
    expect(card.locator(".heats")).to_contain_text(shares)
    # It lies on the picture to the pixel, as strong as the slider says.
    boxes = [card.locator(layer).bounding_box() for layer in (".heat", ".picture")]
    assert boxes[0] == boxes[1]
    slider = card.get_by_role("slider", name="Heat map over the picture")
    for value in ("0", "40", "100"):
        slider.fill(value)
        expect(heat).to_have_css("opacity", f"{int(value) / 100:g}")
        expect(slider).to_have_attribute("aria-valuetext", f"{value} percent")
    # Another label, by a click on it; the kind of map stays.
    other = _ask(served, file)["top"][1]["label"]
    card.get_by_role("button", name=f"{other}, ").click()
    (told,) = _ask(served, file, "explain", label=other)
    expect(heat).to_have_attribute("src", told["layers"]["disagreement"])
    expect(card.locator("[aria-pressed=true]")).to_have_attribute("data-label", other)
    card.get_by_role("button", name="Back to the picture").click()
    expect(heat).to_be_hidden()
    expect(card.locator("[aria-pressed=true]")).to_have_count(0)
    expect(card.get_by_role("button", name=ASK)).to_be_focused()


def test_the_picture_is_saved_as_it_is_shown(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    white = BytesIO()
    Image.new("RGB", (80, 60), "white").save(white, "PNG")
    card = _give(page, _file("sheet.png", white.getvalue()))
    card.get_by_role("button", name=ASK).click()
    for strength, least in (("0", 255), ("100", 0)):
        card.get_by_role("slider").fill(strength)
        with page.expect_download() as download:
            card.get_by_role("button", name="Save picture").click()
        assert download.value.suggested_filename == "sheet chiasm.png"
        saved = Image.open(download.value.path()).convert("RGB")
        assert saved.width == 8 * 80
        assert saved.height > 8 * 60  # a line of words below
        darkest = int(np.asarray(saved)[: 8 * 60].min())
        assert darkest == 255 if least else darkest < 200


# -------------------------------------------------------------------------------- detectors, segmenters, several models


def test_objects(visit: Callable[..., Page], served: Running, shots: Path) -> None:
    page, file = visit(), _file("basket.png")
    page.get_by_label("Model").select_option("instances")
    card = _give(page, file)
    objects = _ask(served, file, model="instances", threshold=0.05)["objects"]
    scores = sorted((found["score"] for found in objects), reverse=True)
    # Random weights are sure of nothing.
    expect(card.locator(".verdict")).to_have_text(f"No objects and {len(objects)} weaker")
    expect(card.locator(".labels li")).to_have_count(0)
    slider = card.get_by_role("slider", name="Show objects from")
    percent = int(100 * scores[5])
    slider.fill(str(percent))
    kept = sum(100 * score >= percent for score in scores)
    rows = card.locator(".labels button")
    expect(rows).to_have_count(kept)
    expect(card.locator(".verdict")).to_contain_text(f"and {len(objects) - kept} weaker")
    # The masks are those of the API, decoded; the better one is on top where two overlap.
    best = sorted(objects, key=lambda found: -found["score"])[:kept]
    masks = [decode_mask(found["mask"], 70, 90) for found in best]
    painted = _canvas(card)
    assert np.array_equal(painted[..., 3] > 0, np.any(masks, axis=0))
    top = next(mask for mask in masks if mask.any())
    colour = colour_of(LABELS.index(best[[mask.any() for mask in masks].index(True)]["label"]))
    assert np.abs(painted[top][:, :3].astype(int) - colour).max() <= 2  # alpha is premultiplied in a canvas
    # One object is picked, in the list and by the pointer, and stands out alone with its frame.
    rows.nth(1).click()
    expect(rows.nth(1)).to_have_attribute("aria-pressed", "true")
    assert (_canvas(card)[..., 3] > 0).sum() <= masks[1].sum()
    left, up, _, down = best[1]["box"]
    frame = card.locator(".boxes rect")
    expect(frame).to_have_count(1)
    assert float(frame.get_attribute("x") or "") == pytest.approx(left)
    assert float(frame.get_attribute("height") or "") == pytest.approx(down - up)
    page.screenshot(path=shots / "objects.png", full_page=True)
    # What spoke for it: of several objects one is chosen, and its box is framed.
    card.get_by_role("button", name="What did the model see?").click()
    told = _ask(served, file, "explain", model="instances", label=best[1]["label"])
    heat, choice = card.locator(".heat"), card.get_by_role("combobox", name="What is explained")
    assert len(told) == 3
    expect(choice.locator("option")).to_have_count(3)
    choice.select_option(index=2)
    expect(heat).to_have_attribute("src", told[2]["layers"]["model"])
    assert float(frame.get_attribute("x") or "") == pytest.approx(told[2]["box"][0])
    expect(card.get_by_role("radio")).to_have_count(0)  # of one branch there is one map


def test_regions(visit: Callable[..., Page], served: Running, shots: Path) -> None:
    page, file = visit(), _file("basket.png")
    page.get_by_label("Model").select_option("segment")
    card = _give(page, file)
    regions = _ask(served, file, model="segment")["regions"]
    rows = card.locator(".labels button")
    expect(card.locator(".verdict")).to_have_text(f"Mostly {regions[0]['label']} {_percent(regions[0]['share'])}")
    assert [row.inner_text().split("\n") for row in rows.all()] == [[r["label"], _percent(r["share"])] for r in regions]
    truth = np.zeros((70, 90, 4), dtype=np.uint8)
    for region in regions:
        truth[decode_mask(region["mask"], 70, 90)] = (*colour_of(LABELS.index(region["label"])), 255)
    assert np.array_equal(_canvas(card), truth)
    card.get_by_role("slider", name="Colours").fill("30")
    expect(card.locator("canvas")).to_have_css("opacity", "0.3")
    page.screenshot(path=shots / "regions.png", full_page=True)
    rows.nth(1).click()
    alone = decode_mask(regions[1]["mask"], 70, 90)
    assert np.array_equal(_canvas(card)[..., 3] > 0, alone)
    # The pointer on the picture lights up what is there.
    y, x = (int(places[0]) for places in np.nonzero(decode_mask(regions[0]["mask"], 70, 90)))
    stage = card.locator(".stage").bounding_box()
    assert stage is not None
    page.mouse.move(stage["x"] + (x + 0.5) * stage["width"] / 90, stage["y"] + (y + 0.5) * stage["height"] / 70)
    expect(rows.nth(0)).to_have_class("pointed")
    assert not np.array_equal(_canvas(card)[..., 3] > 0, alone)
    card.get_by_role("button", name="What did the model see?").click()
    (told,) = _ask(served, file, "explain", model="segment", label=regions[1]["label"])
    expect(card.locator(".heat")).to_have_attribute("src", told["layers"]["model"])


def test_another_model_is_asked_about_the_same_pictures(visit: Callable[..., Page], served: Running) -> None:
    page = visit()
    card = _give(page, _file("basket.png"))
    expect(card.locator(".votes")).to_be_visible()
    expect(page.locator("#about")).to_contain_text("It has 2 branches: Conv and Tokens.")
    page.get_by_label("Model").select_option("segment")
    expect(card.locator(".verdict")).to_contain_text("Mostly")
    expect(page.locator("#about")).to_contain_text("colours a picture")
    page.get_by_label("Model").select_option("fruit")
    expect(card.locator(".votes")).to_be_visible()
    expect(card.locator("canvas")).to_be_hidden()


# ------------------------------------------------------------------------------------------------- how pictures come in


def test_several_pictures(visit: Callable[..., Page], shots: Path) -> None:
    page = visit()
    cards = _give(page, *(_file(f"{name}.png", picture(seed, (40, 40))) for seed, name in enumerate("abcde")))
    expect(cards.locator(".verdict:visible")).to_have_count(5)
    _give(page, _file("f.png"))
    assert [card.get_attribute("aria-label") for card in cards.all()] == [f"{name}.png" for name in "fabcde"]
    page.get_by_role("button", name="Remove b.png").click()
    expect(cards).to_have_count(5)
    expect(page.get_by_role("article", name="c.png")).to_be_focused()
    page.get_by_role("button", name="Clear all").click()
    expect(cards).to_have_count(0)
    expect(page.locator("#zone")).to_be_focused()
    expect(page.get_by_role("button", name="Clear all")).to_be_hidden()


def test_pictures_are_dropped_and_pasted(visit: Callable[..., Page]) -> None:
    page = visit()
    data = list(picture(1, (30, 20)))
    script = """([data, kind]) => {
        const transfer = new DataTransfer();
        if (data) transfer.items.add(new File([new Uint8Array(data)], "a <b>bold</b> name.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, { ...options, clipboardData: transfer })
            : new DragEvent(kind, { ...options, dataTransfer: transfer }));
        return document.body.classList.contains("over");
    }"""
    assert page.evaluate(script, [data, "dragenter"])
    assert not page.evaluate(script, [data, "drop"])
    expect(page.get_by_role("heading", name="a <b>bold</b> name.png")).to_be_visible()
    page.evaluate(script, [data, "paste"])
    expect(page.get_by_role("heading", name="Pasted picture")).to_be_visible()
    expect(page.locator(".verdict:visible")).to_have_count(2)
    page.evaluate(script, [None, "drop"])
    expect(page.locator("#hint")).to_contain_text("No file was in what was dropped.")


def test_the_camera(visit: Callable[..., Page]) -> None:
    page = visit(permissions=["camera"])
    page.get_by_role("button", name="Use the camera").click()
    window = page.get_by_role("dialog", name="Camera")
    expect(window).to_be_visible()
    video = page.locator("video")
    video.evaluate("video => video.readyState >= 2 || new Promise(done => (video.onloadeddata = done))")
    window.get_by_role("button", name="Take the picture").click()
    expect(window).to_be_hidden()
    expect(page.get_by_role("article", name="From the camera")).to_be_visible()
    assert video.evaluate("video => video.srcObject.getTracks().map(track => track.readyState)") == ["ended"]


def test_a_camera_that_is_refused(visit: Callable[..., Page]) -> None:
    page = visit(permissions=[])
    page.get_by_role("button", name="Use the camera").click()
    expect(page.locator("#hint")).to_contain_text("The camera was refused.")
    expect(page.get_by_role("status")).to_contain_text("The camera was refused.")
    line, button = (page.locator(name).bounding_box() for name in ("#hint", "#camera"))
    assert line is not None
    assert button is not None
    assert line["y"] >= button["y"] + button["height"]  # it hides nothing


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_errors_are_one_line_in_their_card(visit: Callable[..., Page], served: Running, shots: Path) -> None:
    page = visit()
    posts: list[str] = []
    page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    text, good = _file("notes.jpg", b"Dear diary", "image/jpeg"), _file("good.png")
    large = _file("large.png", picture(0, (64, 64)) + bytes(200_000))
    wide = BytesIO()
    Image.new("RGB", (1000, 300)).save(wide, "PNG")
    cards = _give(page, text, _file("empty.png", b""), large, _file("wide.png", wide.getvalue()), good)
    expect(page.get_by_role("article", name="good.png").locator(".votes")).to_be_visible()
    lines = page.locator(".failed p")
    expect(lines).to_have_count(4)
    refused = served.client.post("/v1/predict", files={"images": ("notes.jpg", text["buffer"])}).json()["error"]
    assert lines.all_inner_texts() == [
        refused["message"],
        "empty.png is empty.",
        f"large.png has {-(-len(large['buffer']) // 1000)} kB, the server takes up to 200 kB: send a smaller picture.",
        "wide.png has 1,000 × 300 pixels, the server takes up to 0.25 million: send a smaller picture.",
    ]
    assert len(posts) == 2  # what is too large was not even sent
    page.screenshot(path=shots / "errors.png", full_page=True)
    again = cards.first.get_by_role("button", name="Try again: notes.jpg")
    with page.expect_request("**/v1/predict**"):
        again.click()
    expect(lines).to_have_count(4)
    expect(lines.first).to_have_text(refused["message"])
    assert len(posts) == 3


def test_a_server_that_does_not_answer(visit: Callable[..., Page]) -> None:
    page = visit()
    expect(page.locator("#classes")).to_be_visible()
    page.context.set_offline(True)
    card = _give(page, _file("basket.png"))
    expect(card.locator(".failed p")).to_have_text("The server does not answer. Is it still running?")
    page.context.set_offline(False)
    card.get_by_role("button", name="Try again").click()
    expect(card.locator(".votes")).to_be_visible()
    page.context.set_offline(True)
    card.get_by_role("button", name=ASK).click()
    again = card.get_by_role("button", name="Try again: heat maps of basket.png")
    expect(again).to_be_focused()
    expect(card.locator(".verdict")).to_be_visible()  # the answer stays
    page.context.set_offline(False)
    again.press("Enter")
    expect(card.locator(".heat")).to_be_visible()


def test_a_busy_server_is_given_time(visit: Callable[..., Page], tmp_path: Path) -> None:
    """With room for one image in the queue, three pictures at a time are two too many."""
    with running(Served("fruit", classifier(tmp_path), device="cpu"), queue=1, wait_ms=300.0) as server:
        page = visit(server.url)
        statuses: list[int] = []
        page.on("response", lambda answer: statuses.append(answer.status))
        cards = _give(page, *(_file(f"{name}.png", picture(seed, (400, 400))) for seed, name in enumerate("abc")))
        expect(cards.locator(".votes")).to_have_count(3)
        expect(page.locator("#chooser")).to_be_hidden()  # there is one model
    assert 429 in statuses


def test_cards_that_are_gone_do_not_wait_for_a_busy_server(visit: Callable[..., Page]) -> None:
    """The turns of pictures that were to be sent again in a minute are free at once."""
    page = visit()
    expect(page.locator("#classes")).to_be_visible()
    busy = {"status": 429, "headers": {"Retry-After": "60"}, "json": {"error": {"code": "busy", "message": "busy."}}}
    page.route("**/v1/predict**", lambda route: route.fulfill(**busy))
    cards = _give(page, *(_file(f"{i}.png", picture(i)) for i in range(3)))
    expect(cards.get_by_text("Trying again in 60 s")).to_have_count(3)
    page.get_by_role("button", name="Clear all").click()
    page.unroute("**/v1/predict**")
    card = _give(page, _file("basket.png"))
    expect(card.locator(".votes")).to_be_visible()


def test_without_javascript(visit: Callable[..., Page]) -> None:
    """Nothing stands there that would do nothing. (What `noscript` says Playwright's browser does not show.)"""
    page = visit(java_script_enabled=False)
    expect(page.get_by_role("heading", name="chiasm")).to_be_visible()
    expect(page.get_by_role("button")).to_have_count(0)


def test_the_key(visit: Callable[..., Page], tmp_path: Path) -> None:
    with running(Served("fruit", classifier(tmp_path), device="cpu"), key="open-sesame") as server:
        page = visit(server.url)
        field = page.get_by_label("API key")
        expect(page.locator("#key-why")).to_have_text("This server asks for a key.")
        _give(page, _file("basket.png"))
        for key in ("wrong-key", "open-sesame"):
            field.fill(key)
            page.get_by_role("button", name="Use this key").click()
            if key == "wrong-key":
                expect(page.locator("#key-why")).to_contain_text("does not take that key")
        expect(field).to_be_hidden()
        expect(page.locator(".votes")).to_be_visible()
        page.reload()
        expect(page.locator("#classes")).to_be_visible()
        expect(field).to_be_hidden()


# ----------------------------------------------------------------------------------- keyboards, screen readers, screens


def test_everything_by_keyboard(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    (tmp_path / "basket.png").write_bytes(picture(3, (90, 70)))
    expect(page.locator("#classes")).to_be_visible()

    def reach(target: Locator) -> None:
        for _ in range(30):
            if target.evaluate("element => element === document.activeElement"):
                seen = "element => getComputedStyle(element.closest('.segments label') ?? element).outlineStyle"
                assert target.evaluate(seen) == "solid", "the focus is not seen"
                return
            page.keyboard.press("Tab")
        pytest.fail(f"the tab key does not reach {target}")

    for press in ("Enter", "Space"):
        reach(page.locator("#zone"))
        page.keyboard.press(press)
        while not choosers:
            page.wait_for_timeout(20)
        choosers.pop().set_files(tmp_path / "basket.png")
    expect(page.locator(".votes")).to_have_count(2)
    reach(page.get_by_role("button", name="Remove basket.png").first)
    page.keyboard.press("Enter")
    card = page.locator("article")
    expect(card.locator(".votes")).to_be_visible()
    reach(card.get_by_role("button", name=ASK))
    page.keyboard.press("Enter")
    expect(card.get_by_role("radio", name="Fused")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(card.get_by_role("radio", name="Tokens")).to_be_checked()
    expect(card.locator(".heat")).to_have_attribute("alt", re.compile("Heat map Tokens"))
    slider = card.get_by_role("slider")
    reach(slider)
    page.keyboard.press("ArrowLeft")
    expect(slider).to_have_attribute("aria-valuetext", "84 percent")
    reach(card.get_by_role("button", name="Back to the picture"))
    page.keyboard.press("Space")
    expect(card.locator(".heat")).to_be_hidden()
    reach(card.locator(".labels button").nth(1))
    page.keyboard.press("Enter")
    expect(card.locator(".heat")).to_be_visible()
    # The list of regions is one stop of the tab key; arrow keys go on from there.
    page.get_by_label("Model").select_option("segment")
    expect(card.locator(".verdict")).to_contain_text("Mostly")
    rows = card.locator(".labels button")
    reach(rows.first)
    page.keyboard.press("ArrowDown")
    expect(rows.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(rows.nth(1)).to_have_attribute("aria-pressed", "true")


def _names(page: Page) -> list[tuple[str, str]]:
    """Role and accessible name of what can be used or looked at, as the browser tells a screen reader."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    asked = {"button", "link", "slider", "radio", "combobox", "textbox", "image", "article", "region", "dialog"}
    return [(role, name) for role, name in told if role in asked]


def test_screen_readers_are_told_everything(visit: Callable[..., Page]) -> None:
    page = visit()
    card = _give(page, _file("basket.png"))
    card.get_by_role("button", name=ASK).click()
    expect(card.locator(".heat")).to_be_visible()
    names = _names(page)
    assert [role for role, name in names if not name.strip()] == []
    assert {"button", "slider", "radio", "combobox", "image", "article", "region"} <= {role for role, _ in names}
    for landmark in ("banner", "main", "contentinfo"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("status").get_attribute("id") == "said"
    _give(page, _file("notes.jpg", b"text", "image/jpeg"))
    expect(page.get_by_role("status")).to_contain_text("notes.jpg: ")


@pytest.mark.parametrize("model", ["fruit", "instances", "segment"])
def test_small_screens(visit: Callable[..., Page], shots: Path, model: str) -> None:
    """Nothing lies outside of a phone's screen, and what is touched is large enough for a finger."""
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    _fits(page)
    page.get_by_label("Model").select_option(model)
    name = f"{'a long name without a space '.replace(' ', '_') * 6}.png"
    tall, text = _file("tall.png", picture(1, (20, 200))), _file("notes.jpg", b"text", "image/jpeg")
    cards = _give(page, _file(name), tall, text)
    expect(cards.locator(".failed")).to_have_count(1)
    expect(cards.locator(".verdict:visible")).to_have_count(2)
    if model == "instances":
        cards.first.get_by_role("slider").fill("20")
    page.screenshot(path=shots / f"phone_{model}.png", full_page=True)
    _fits(page)
    cards.first.locator(".heats .main").click()
    expect(cards.first.locator(".heat")).to_be_visible()
    page.screenshot(path=shots / f"phone_{model}_heat_map.png", full_page=True)
    _fits(page)


def _fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.evaluate("""() => [...document.querySelectorAll("button, select, summary, input, .segments label")]
        .filter(element => element.checkVisibility() && element.type !== "radio")
        .map(element => [element.id || element.className || element.textContent, element.getBoundingClientRect()])
        .filter(([, box]) => box.height < 43.9 || box.width < 43.9 || box.left < 0 || box.right > innerWidth)
        .map(([name]) => name)""")
    assert small == []


CONTRAST = """() => {
    const channels = colour => {
        const canvas = document.createElement("canvas").getContext("2d");
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = colour => colour.slice(0, 3).map(value => value / 255)
        .map(value => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = element => {
        for (; element; element = element.parentElement) {
            const colour = channels(getComputedStyle(element).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const contrasts = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const words = walker.currentNode.data.trim();
        const element = walker.currentNode.parentElement;
        if (!words || !element.checkVisibility() || element.closest(".tags, .unseen, template")) continue;
        const [one, other] = [channels(getComputedStyle(element).color), ground(element)].map(light);
        contrasts.push([words, (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05)]);
    }
    return contrasts;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit: Callable[..., Page], shots: Path, scheme: str) -> None:
    """Every word stands out from its ground by 4.5 to 1 or more (WCAG AA), in either theme."""
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (ground == "rgb(18, 23, 29)") == (scheme == "dark")
    page.evaluate("document.getElementById('key').hidden = false")
    cards = _give(page, _file("basket.png"), _file("notes.jpg", b"text", "image/jpeg"))
    expect(cards.locator(".failed")).to_have_count(1)
    cards.get_by_role("button", name=ASK).click()
    expect(cards.locator(".heat:visible")).to_have_count(1)
    page.locator("#classes summary").click()
    words = page.evaluate(CONTRAST)
    assert len(words) > 30
    assert [(text, ratio) for text, ratio in words if ratio < 4.5] == []
    assert page.locator(".card").first.evaluate("card => getComputedStyle(card).animationName") == "none"
    page.screenshot(path=shots / f"{scheme}.png", full_page=True)
