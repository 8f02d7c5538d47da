"""The demonstration, cut to seconds: it ends with a table, a picture and a report, and starts again where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from chiasm.cli import main


def test_the_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--minutes", "0.05", "--out", str(tmp_path / "demo")]
    assert main([*words, "--seed", "3"]) == 0
    table = capsys.readouterr().out
    assert "guessing" in table
    assert "95 % interval" in table
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    with Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert picture.width > picture.height > 500
    assert main(words) == 0  # a finished run is measured again, not trained again
    assert "is finished" in capsys.readouterr().err
    assert "seed=4" in (tmp_path / "demo" / "metrics.json").read_text(), "not the images that chose the epoch"
    assert main([*words, "--seed", "4"]) == 2
    assert "was made with --seed 3" in capsys.readouterr().err


def test_the_demonstration_does_not_write_into_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
