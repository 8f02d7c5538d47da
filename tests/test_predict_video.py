"""Videos: read as far as they go, upright and with every defect named; predicted frame by frame and drawn on."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import chiasm
from chiasm.cli import main
from chiasm.data.video import VideoWriter, count_frames, is_video, read_frames
from chiasm.errors import ChiasmError, ImageError
from chiasm.model_file import ModelInfo, preprocess_of, save_model
from chiasm.report.pictures import Masks, Pictures
from chiasm.results import Detections, Segmentation

av = pytest.importorskip("av", reason="videos need PyAV")

WIDTH, HEIGHT = 64, 48


def _grey(number: int) -> int:
    """The brightness of a frame, by which it is known again."""
    return 20 + 4 * number


def _video(path: Path, frames: int = 40, *, noise: bool = False, codec: str = "mpeg4", **options: str) -> str:
    """25 frames a second, each of one grey, the left half darker; with noise they are large, so cuts hit the middle."""
    pixels = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            frame = np.full((HEIGHT, WIDTH, 3), _grey(number), dtype=np.uint8)
            frame[:, : WIDTH // 2] //= 2
            if noise:
                frame = pixels.integers(0, 256, frame.shape, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def _read(path: str, every: int = 1) -> tuple[list[int], str]:
    """The numbers of the frames that could be read, and what was wrong."""
    numbers = []
    try:
        for frame, _ in read_frames(path, every):
            numbers.append(frame.number)
    except ImageError as error:
        return numbers, str(error).removeprefix(f"{path}: ")
    return numbers, ""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = chiasm.create_model("test_resnet", num_classes=3)
    info = ModelInfo(architecture="test_resnet", labels=("x", "y", "z"), preprocess=preprocess_of(model, 32))
    save_model(path := tmp_path_factory.mktemp("model") / "m.safetensors", model, info)
    return str(path)


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.MOV"])
def test_frames_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    path = _video(tmp_path / name)
    assert is_video(path)
    seen = list(read_frames(path, every=7))
    assert [frame.number for frame, _ in seen] == [0, 7, 14, 21, 28, 35]
    for frame, pixels in seen:
        assert (frame.name, frame.rate) == (f"{path}#{frame.number}", 25)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, HEIGHT, WIDTH))
        assert abs(pixels[:, :, 40:].float().mean() - _grey(frame.number)) < 9
    assert count_frames(path) in (40, None)


def test_a_video_that_was_held_upright_is_read_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    content = bytearray(Path(_video(path)).read_bytes())
    upright = np.stack([pixels.numpy() for _, pixels in read_frames(str(path))])
    # The matrix of the track's header: a quarter turn clockwise, as phones write it.
    plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    start = content.index(plain, content.index(b"tkhd"))
    content[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30)
    path.write_bytes(content)
    turned = np.stack([pixels.numpy() for _, pixels in read_frames(str(path))])
    assert np.array_equal(turned, np.rot90(upright, -1, (2, 3)))


def test_a_video_that_is_cut_off_is_read_to_there(tmp_path: Path) -> None:
    for name, options in (("a.mkv", {}), ("b.mp4", {"movflags": "faststart"})):
        path = Path(_video(tmp_path / name, noise=True, **options))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 6 // 10])
        numbers, reason = _read(str(path))
        assert numbers == list(range(len(numbers)))
        assert 15 < len(numbers) < 30
        assert "cut off after" in reason
        assert "of 1.6 seconds" in reason


def test_damage_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    path = Path(_video(tmp_path / "a.mp4", noise=True))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    numbers, reason = _read(str(path))
    assert 25 < len(numbers) < 40
    assert numbers[-1] == 39
    assert "damaged frames left out" in reason


def _sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    secret = _video(tmp_path / "secret.mp4")
    bad = {name: tmp_path / f"{name}.mp4" for name in ("text", "empty", "half", "playlist", "sound", "missing")}
    bad["text"].write_text("not a video")
    bad["empty"].touch()
    content = Path(secret).read_bytes()
    bad["half"].write_bytes(content[: len(content) // 2])  # the index stands at the end
    bad["playlist"].write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:1.6,\n{secret}\n#EXT-X-ENDLIST\n")
    _sound(bad["sound"])
    said = {"sound": "no pictures", "missing": "No such file", "empty": "the file is empty"}
    for name, path in bad.items():
        numbers, reason = _read(str(path))
        assert numbers == [], "a file was opened that was not given"
        assert said.get(name, "cut off or not a video") in reason
        assert count_frames(str(path)) is None


def test_without_pyav_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert _read(str(tmp_path / "a.mp4"))[1] == "a video; to read it, install PyAV: pip install 'chiasm[video]'."


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_video_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, Fraction(30000, 1001) / 3)
    for number, size in enumerate([(65, 47), (90, 30), (20, 80)]):
        writer.add(Image.new("RGB", size, (80 * number, 0, 0)))
    assert not path.exists()
    writer.finish()
    seen = list(read_frames(str(path)))
    assert [pixels.shape for _, pixels in seen] == [(3, 48, 66)] * 3
    assert seen[0][0].rate == pytest.approx(Fraction(30000, 3003), rel=1e-3)
    assert seen[2][1][:, 10, 40].min() > 240, "a smaller picture is filled up with white"
    writer = VideoWriter(path, Fraction(25))
    writer.add(Image.new("RGB", (64, 48)))
    writer.abandon()
    assert len(list(read_frames(str(path)))) == 3, "the complete file was replaced"
    with pytest.raises(ChiasmError, match=r"nowhere/a\.mp4: cannot be written \(No such file"):
        VideoWriter(tmp_path / "nowhere" / "a.mp4", Fraction(25))


# ----------------------------------------------------------------------------------------------------------------- verb


def test_frames_are_predicted_like_images(model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shots"
    folder.mkdir()
    path = _video(folder / "clip.mp4")
    Image.new("RGB", (40, 40), "orange").save(folder / "a.png")
    assert main(["predict", model_file, str(folder), "--every", "13", "--format", "jsonl", "--batch-size", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in rows] == [f"{folder}/a.png", *(f"{path}#{n}" for n in (0, 13, 26, 39))]
    frames = [pixels for _, pixels in read_frames(path, 13)]
    for row, result in zip(rows[1:], chiasm.load(model_file)(frames), strict=True):
        assert row["score"] == pytest.approx(result.score, abs=1e-5)
    assert main(["predict", model_file, str(folder / "*.mp4"), "--format", "csv", "--every", "100"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1


def test_a_broken_video_is_named_after_what_could_be_read(
    model_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(_video(tmp_path / "broken.mkv", noise=True))
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 6 // 10])
    sound, hopeless = _video(tmp_path / "sound.mp4", 5), tmp_path / "hopeless.mp4"
    hopeless.write_text("not a video")
    words = ["predict", model_file, str(broken), str(hopeless), sound, "--format", "csv", "--batch-size", "4"]
    assert main(words) == 1
    told = capsys.readouterr()
    sources = [row["source"] for row in csv.DictReader(io.StringIO(told.out))]
    count = len(sources) - 5
    assert sources == [f"{broken}#{n}" for n in range(count)] + [f"{sound}#{n}" for n in range(5)]
    assert f"2 of {count + 7} images could not be read" in told.err
    assert [str(path) in record.message for path, record in zip((broken, hopeless), caplog.records, strict=True)]
    assert main(["predict", model_file, str(hopeless)]) == 1


def test_the_result_is_drawn_on_the_video(model_file: str, tmp_path: Path) -> None:
    path = _video(tmp_path / "clip.mp4")
    before = Path(path).read_bytes()
    image = tmp_path / "clip.png"
    Image.new("RGB", (40, 40), "orange").save(image)
    given = [path, str(image), path]
    list(chiasm.predict(model=model_file, images=given, draw=str(tmp_path), every=4, batch_size=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("clip-2.predicted.mp4", "clip.mp4", "clip.png", "clip.predicted.jpg", "clip.predicted.mp4"),
    ]
    assert Path(path).read_bytes() == before
    for name in ("clip.predicted.mp4", "clip-2.predicted.mp4"):
        drawn = list(read_frames(str(tmp_path / name)))
        assert len(drawn) == 10
        assert drawn[0][0].rate == Fraction(25, 4)
        for number, (_, pixels) in enumerate(drawn):
            right = pixels[:, 10:HEIGHT, pixels.shape[2] // 2 + 10 : pixels.shape[2] // 2 + 40].float().mean()
            assert abs(right - _grey(4 * number)) < 6, "the picture is not that of its frame"


def test_a_video_drawn_by_halves_is_not_there(model_file: str, tmp_path: Path) -> None:
    path = _video(tmp_path / "clip.mp4")
    results = chiasm.predict(model=model_file, images=[path], draw=str(tmp_path / "drawn"), batch_size=4)
    next(results)
    results._results.close()
    assert os.listdir(tmp_path / "drawn") == ["clip.predicted.mp4.part"]


@pytest.mark.parametrize("kind", ["objects", "maps"])
def test_objects_and_maps_on_videos(tmp_path: Path, kind: str) -> None:
    """Two videos of one name; legends change from frame to frame and the size does not."""
    os.mkdir(tmp_path / "b")
    paths = [_video(tmp_path / "a.mp4", 6), _video(tmp_path / "b" / "a.mp4", 4)]
    masks = Masks(str(tmp_path / "masks"), paths)
    labels = tuple(f"class {i}" for i in range(30))
    found = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    with Pictures(str(tmp_path / "drawn"), paths, top=3, every=1) as pictures:
        for path in paths:
            for frame, pixels in read_frames(path):
                many = 5 * frame.number + 1
                result: Segmentation | Detections = Segmentation(
                    source=frame.name, labels=labels, classes=(found % many).astype(np.uint8)
                )
                if kind == "objects":
                    result = Detections(
                        source=frame.name,
                        labels=labels,
                        size=(HEIGHT, WIDTH),
                        boxes=np.tile([2.0, 3, 20, 30], (many, 1)),
                        classes=np.arange(many) % 30,
                        scores=np.linspace(0.5, 1, many),
                        masks=np.stack([found % many == i for i in range(many)]),
                    )
                pictures.add(result, frame, pixels)
                masks.add(result, frame)
    for name, frames in (("a.predicted.mp4", 6), ("a-2.predicted.mp4", 4)):
        sizes = {pixels.shape for _, pixels in read_frames(str(tmp_path / "drawn" / name))}
        assert len(sizes) == 1
        assert len(list(read_frames(str(tmp_path / "drawn" / name)))) == frames
    names = sorted(os.listdir(tmp_path / "masks"))
    assert names == sorted([*(f"a#{n}.png" for n in range(6)), *(f"a-2#{n}.png" for n in range(4))])
    with Image.open(tmp_path / "masks" / "a#2.png") as image:
        offset = 1 if kind == "objects" else 0
        assert np.array_equal(np.asarray(image), found % 11 + offset)


def test_every_is_a_count(model_file: str) -> None:
    with pytest.raises(ChiasmError, match="every is 0"):
        chiasm.predict(model=model_file, images=["a.mp4"], every=0)
