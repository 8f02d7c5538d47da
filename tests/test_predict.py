"""The predictor and `chiasm predict`: the same answers whichever way images come, in flat memory, bad ones named."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import chiasm
from chiasm.cli import main
from chiasm.config import Preprocess
from chiasm.data.images import read_image
from chiasm.data.transforms import eval_transform
from chiasm.errors import ChiasmError, DataError, ImageError, ModelFileError
from chiasm.model_file import ModelInfo, load_model, preprocess_of, save_model
from chiasm.predictor import Predictor, load
from chiasm.report import predictions
from chiasm.results import Classification

NANO = "conformer_nano_patch4_32"
LABELS = ("apple", "pear", "plum, dried", "quince")


def _save(path: Path, architecture: str = NANO, **model_args: object) -> str:
    torch.manual_seed(0)
    model = chiasm.create_model(architecture, num_classes=len(LABELS), **model_args)
    info = ModelInfo(
        architecture=architecture, model_args=model_args, labels=LABELS, preprocess=preprocess_of(model, 32)
    )
    save_model(path, model, info)
    return str(path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(tmp_path_factory.mktemp("model") / "fruit.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Five images of noise; the names sort in this order."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    paths = [str(folder / name) for name in ("a.png", "b ü.png", "c,d.png", "e.jpg", "f.png")]
    for path in paths:
        Image.fromarray(pixels.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return paths


def _broken(folder: Path) -> str:
    path = folder / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not much of a JPEG")
    return str(path)


class _Colours(nn.Module):
    """The smallest network: the logits of two classes from the mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.mean((2, 3)))


def _tiny_predictor() -> Predictor:
    info = ModelInfo(architecture="colours", labels=("warm", "cold"), preprocess=Preprocess(size=(32, 32)))
    return Predictor(_Colours(), info, device="cpu")


# ------------------------------------------------------------------------------------------------------------ predictor


def test_the_answer_is_that_of_the_bare_model(model_file: str, photos: list[str]) -> None:
    predictor = load(model_file, device="cpu")
    results = predictor(photos, batch_size=2)
    model, transform = load_model(model_file)[0], eval_transform(predictor.info.preprocess)
    with torch.no_grad():
        branches = model.forward_branches(torch.stack([transform(read_image(path)) for path in photos]))
    for i, result in enumerate(results):
        expected = torch.stack([branches["conv"][i], branches["tokens"][i]]).mean(0).softmax(-1)
        np.testing.assert_allclose(result.probabilities, expected, atol=1e-6)
        np.testing.assert_allclose(result.branches["tokens"], branches["tokens"][i].softmax(-1), atol=1e-6)
        assert result.source == photos[i]
        assert result.labels == LABELS


def test_every_kind_of_image_gives_the_same(model_file: str, photos: list[str]) -> None:
    predictor = load(model_file, device="cpu")
    path = photos[0]
    with Image.open(path) as opened:
        image = opened.copy()
    kinds = [path, Path(path), image, np.asarray(image), read_image(path)]
    together = predictor(kinds)
    for kind, result in zip(kinds, together, strict=True):
        np.testing.assert_allclose(result.probabilities, together[0].probabilities, atol=1e-6)
        np.testing.assert_allclose(predictor(kind)[0].probabilities, together[0].probabilities, atol=1e-6)
    assert [r.source for r in together] == [path, path, "image 2", "image 3", "image 4"]
    assert predictor([]) == []
    grey = np.asarray(image.convert("L"))
    np.testing.assert_allclose(
        predictor(grey)[0].probabilities, predictor(np.stack([grey] * 3, -1))[0].probabilities, atol=1e-6
    )


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(3, 8, 8), "uint8 tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "several go in a list"),
        (np.zeros((8, 8, 3)), "uint8 array"),
        (np.zeros((3, 8, 9), dtype=np.uint8), r"\(3, 8, 9\)"),
        (7, "saw int"),
        ("nowhere.png", "nowhere.png: no such file"),
    ],
)
def test_what_is_no_image_is_told(image: object, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        _tiny_predictor()(image)  # type: ignore[arg-type]


def test_a_name_has_random_weights_and_says_so() -> None:
    assert load("test_resnet", device="cpu").info.trained is False


@pytest.mark.parametrize("architecture", [NANO, "test_resnet", "test_vit"])
def test_another_image_size(tmp_path: Path, photos: list[str], architecture: str) -> None:
    path = _save(tmp_path / "m.safetensors", architecture, **({"img_size": 32} if architecture == "test_vit" else {}))
    predictor = load(path, device="cpu", image_size=64)
    assert predictor.info.preprocess.size == (64, 64)
    assert len(predictor(photos[:2])) == 2


def test_impossible_settings_are_told(model_file: str) -> None:
    with pytest.raises(ChiasmError, match=r"image_size is 0"):
        load(model_file, image_size=0)
    with pytest.raises(ChiasmError, match=r"device 'cuda:99' is not here; there is .*cpu"):
        load(model_file, device="cuda:99")
    with pytest.raises(ChiasmError, match="batch_size is 0"):
        next(_tiny_predictor().stream(["a.png"], batch_size=0))


def test_weights_that_answer_nonsense_are_told(photos: list[str]) -> None:
    model = _Colours()
    nn.init.constant_(model.head.weight, float("nan"))
    predictor = Predictor(model, _tiny_predictor().info, device="cpu")
    with pytest.raises(ModelFileError, match="not finite"):
        predictor(photos)


# --------------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 3), (100, None)])
def test_a_stream_keeps_the_order_and_goes_on_after_broken_images(
    photos: list[str], tmp_path: Path, batch_size: int, workers: int | None
) -> None:
    broken, missing = _broken(tmp_path), str(tmp_path / "missing.png")
    paths = [missing, photos[0], broken, broken, *photos[1:], missing]
    predictor = _tiny_predictor()
    outcomes = list(predictor.stream(paths, batch_size=batch_size, workers=workers))
    assert [o.path if isinstance(o, ImageError) else o.source for o in outcomes] == paths
    good = [outcome for outcome in outcomes if isinstance(outcome, Classification)]
    for outcome, expected in zip(good, predictor(photos), strict=True):
        np.testing.assert_allclose(outcome.probabilities, expected.probabilities, atol=1e-6)


def test_a_stream_reads_ahead_two_batches_at_most(photos: list[str]) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for path in itertools.cycle(photos):
            taken += 1
            yield path

    stream = _tiny_predictor().stream(endless(), batch_size=8)
    assert taken == 0, "a stream that nobody reads takes nothing"
    for given in range(1, 60):
        next(stream)
        assert given <= taken <= given + 2 * 8
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_flat(photos: list[str], tmp_path: Path) -> None:
    """12,000 files, a tenth of them broken: what is kept of each, were it only its pixels, would show."""
    paths = [*photos * 2, _broken(tmp_path)]
    stream = _tiny_predictor().stream(itertools.islice(itertools.cycle(paths), 12_000), batch_size=32)

    def megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    for _ in itertools.islice(stream, 2_000):
        pass
    before = megabytes()
    rest = sum(1 for _ in stream)
    assert rest == 10_000
    assert megabytes() - before < 16, "10,000 inputs of 32 x 32 px alone are 117 MB"


def test_prediction_needs_no_training_code(model_file: str, photos: list[str]) -> None:
    code = (
        "import sys, chiasm; chiasm.load(sys.argv[1])(sys.argv[2]); "
        "training = {'pytorch_lightning', 'torchmetrics', 'matplotlib', 'chiasm.engine'} & set(sys.modules); "
        "sys.exit(str(training) if training else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, model_file, photos[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------- verb


def test_the_function_gives_results_one_by_one(model_file: str, photos: list[str]) -> None:
    results = chiasm.predict(model=model_file, images=photos, device="cpu", batch_size=2)
    first = next(results)
    assert first.source == photos[0]
    assert [result.source for result in results] == photos[1:]
    assert (results.seen, results.failed, results.info.labels) == (5, 0, LABELS)


def test_jsonl(model_file: str, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path(photos[0]).parent)
    assert main(["predict", model_file, folder, "--format", "jsonl", "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [result.to_dict(top=2) for result in load(model_file)(photos)]
    assert [row["source"] for row in rows] == photos
    for row, wanted in zip(rows, expected, strict=True):
        assert row["label"] == wanted["label"]
        assert len(row["top"]) == 2
        assert set(row["branches"]) == {"conv", "tokens"}
        assert row["score"] == pytest.approx(wanted["score"], abs=1e-6)


def test_csv_columns(model_file: str, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", model_file, *photos, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == [
        *("source", "label", "probability", "agreement"),
        *("conv_label", "conv_probability", "tokens_label", "tokens_probability"),
        *("label_2", "probability_2", "label_3", "probability_3"),
    ]
    for row, result in zip(rows, load(model_file)(photos), strict=True):
        assert row["source"] == result.source
        assert row["label"] == result.label
        assert row["agreement"] == str(result.agreement).lower()
        assert row["conv_label"] == result.votes["conv"]
        assert float(row["probability_2"]) == pytest.approx(result.top(2)[1][1], abs=1e-5)


def test_the_table_says_all_of_each_image(
    model_file: str, photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "TABLE_ROWS", 2)  # pieces of two rows: five images make three
    assert main(["predict", model_file, *photos]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("image ") for line in lines) == 3
    for result in load(model_file)(photos):
        line = next(line for line in lines if line.startswith(result.source))
        assert result.label in line
        assert f"{result.score:.1%}" in line
        assert all(vote in line for vote in result.votes.values())


def test_broken_images_are_named_left_out_and_counted(
    model_file: str, photos: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    broken = _broken(Path(photos[0]).parent)
    missing = "nowhere ü.png"
    assert main(["predict", model_file, *photos, broken, missing, "--format", "csv"]) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1 + len(photos)
    assert "2 of 7 images could not be read" in told.err
    assert [record.message for record in caplog.records if broken in record.message]
    assert [record.message for record in caplog.records if missing in record.message]


def test_paths_come_from_stdin(
    model_file: str, photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bracket = str(Path(photos[0]).with_name("shot[1].png"))
    Path(photos[0]).rename(bracket)  # a name that would be a pattern on the command line
    lines = [bracket, "", *photos[1:]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\r\n".join(lines)))
    assert main(["predict", model_file, "-", "--format", "jsonl"]) == 0
    told = [json.loads(line)["source"] for line in capsys.readouterr().out.splitlines()]
    assert told == [bracket, *photos[1:]]


def test_no_image_at_all_is_an_error(model_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["predict", model_file, "-"]) == 2
    with pytest.raises(DataError):
        chiasm.predict(model=model_file, images=[str(tmp_path)], out=str(tmp_path / "x.csv"))
    assert not list(tmp_path.iterdir()), "an empty file was left behind"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"images": []}, "which images"),
        ({"images": ["a.png"], "top": 0}, "top is 0"),
        ({"images": ["a.png"], "out": "."}, "a folder"),
        ({"images": ["a.png"], "workers": -1}, "workers is -1"),
    ],
)
def test_settings_that_cannot_be(model_file: str, flags: dict, said: str) -> None:
    with pytest.raises(ChiasmError, match=said):
        list(chiasm.predict(model=model_file, **flags))


def test_a_file_is_complete_or_not_there(model_file: str, photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "results" / "all.csv"
    results = chiasm.predict(model=model_file, images=photos, out=str(out))
    assert results.out == out
    assert list(results) == [], "what is in the file is not given twice"
    assert len(out.read_text(encoding="utf-8").splitlines()) == 6, "the format follows the file's name"
    before = out.read_bytes()
    with pytest.raises(DataError):  # comes to a folder without images after five results
        chiasm.predict(model=model_file, images=[*photos, str(out.parent)], out=str(out), batch_size=1)
    assert out.read_bytes() == before, "the complete file was replaced by half a one"
    assert out.with_name("all.csv.part").exists(), "what was done is lost"


def test_a_full_disk_is_told(model_file: str, photos: list[str], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on files need a Unix")
    out = tmp_path / "full.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # the kernel then refuses to write on, as a full disk does
    try:
        with pytest.raises(ChiasmError, match=r"full\.csv: cannot be written \(File too large\)"):
            chiasm.predict(model=model_file, images=photos, out=str(out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()


def test_pictures_are_drawn(model_file: str, photos: list[str], tmp_path: Path) -> None:
    twin = tmp_path / "other" / "a.png"
    twin.parent.mkdir()
    twin.write_bytes(Path(photos[0]).read_bytes())
    originals = [Path(path).read_bytes() for path in photos]
    folder = Path(photos[0]).parent
    assert len(list(chiasm.predict(model=model_file, images=[*photos, str(twin)], draw=str(folder)))) == 6
    drawn = sorted(path.name for path in folder.glob("*.predicted.jpg"))
    assert drawn == [f"{name}.predicted.jpg" for name in ("a-2", "a", "b ü", "c,d", "e", "f")]
    assert [Path(path).read_bytes() for path in photos] == originals
    with Image.open(folder / "a.predicted.jpg") as image:
        assert image.height > image.width * 40 / 36


def test_random_weights_are_told(photos: list[str], caplog: pytest.LogCaptureFixture) -> None:
    list(chiasm.predict(model="test_resnet", images=photos[:1]))
    assert [record.message for record in caplog.records if "random weights" in record.message]


def test_a_reader_who_leaves_is_no_error(model_file: str, photos: list[str]) -> None:
    """More rows than a pipe holds, and a reader who takes one."""
    command = [sys.executable, "-m", "chiasm", "predict", model_file, "-", "--format", "jsonl", "--batch-size", "16"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write("\n".join(photos * 60).encode())
    process.stdin.close()
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
