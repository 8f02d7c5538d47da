"""Published weights: addresses that are timm's or carry a hash, and one quick line where they cannot be had."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models._registry import _model_pretrained_cfgs

import chiasm
from chiasm.cli import main
from chiasm.errors import CheckpointError, UnknownNameError
from chiasm.models import conformer, create_model, list_models
from chiasm.models.checkpoint_file import HASH_IN_NAME
from chiasm.models.identify import fit
from chiasm.models.published import Source, published_at
from chiasm.models.sketch import shapes_only, sketch

NAME = "conformer_nano_patch4_32"
PUBLISHED = [name for name in list_models() if "nano" not in name]
# timm's own architectures by the repository of their weights.
TIMMS = {
    timm.models.get_pretrained_cfg(name).hf_hub_id: architecture
    for name in timm.list_pretrained()
    if (architecture := name.split(".")[0]) not in list_models()
}


def _line(error: pytest.ExceptionInfo[CheckpointError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_address_carries_a_hash_or_is_that_of_timms_model_of_the_size(name: str) -> None:
    source = published_at(name)
    if source.repository:
        assert TIMMS[source.repository] == name.replace("_window", "_patch4_window").removesuffix("_256")
    else:
        assert HASH_IN_NAME.search(source.address)


@pytest.mark.parametrize("name", ["swin_tiny_window7_224", "mobilevit_xxs_256", "mobilevitv2_050_256"])
def test_timms_model_has_the_very_weights_of_ours(name: str) -> None:
    source = published_at(name)
    with shapes_only():
        theirs = timm.create_model(TIMMS[source.repository]).state_dict()
    match = fit(theirs, name)
    assert (match.share, match.classes) == (1, 1000)
    assert set(theirs) == set(sketch(name).state_dict())


def test_without_a_network_one_line_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be fetched from https://.*tiny.*offline") as error:
        chiasm.create_model("swin_tiny_window7_224", pretrained=True)
    assert "give it as --weights FILE" in _line(error)
    assert main(["train", "scenes:size=64,count=32,val=16", "--model", "mobilevit_xxs_256", "--pretrained"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("chiasm: the published weights of mobilevit_xxs_256 cannot be fetched from https://")


@pytest.mark.parametrize("name", ["swin_tiny_window7_224", "resnet18"])
def test_a_hub_that_does_not_answer_is_asked_once(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    nowhere = Source("http://127.0.0.1:9/model.safetensors", "timm/nothing")
    monkeypatch.setattr("chiasm.models.published.published_at", lambda name: nowhere)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"from http://127\.0\.0\.1:9.*refused") as error:
        chiasm.create_model(name, pretrained=True)
    assert _line(error)
    assert time.perf_counter() - start < 5  # the hub's own way waits for half a minute or more


def test_nothing_published_and_unknown_tags() -> None:
    with pytest.raises(CheckpointError, match="no weights are published for conformer_nano_patch4_32") as error:
        chiasm.create_model(NAME, pretrained=True)
    assert _line(error)
    with pytest.raises(UnknownNameError, match=r"did you mean.* resnet18\.a1_in1k"):
        chiasm.create_model("resnet18.a1_in", pretrained=True)


def test_a_published_file_is_fetched_checked_and_loaded(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = server
    torch.manual_seed(1)
    origin = create_model(NAME)
    torch.save({"state_dict": conformer.DIALECTS[1].write(origin.state_dict())}, folder / "x.pth")
    content = (folder / "x.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    stated = _model_pretrained_cfgs[NAME]

    monkeypatch.setattr(stated, "url", f"{address}/conformer-{digest}.pth")
    with pytest.raises(CheckpointError, match=rf"conformer-{digest}\.pth \(HTTP Error 404"):
        chiasm.create_model(NAME, pretrained=True)
    (folder / f"conformer-{digest}.pth").write_bytes(content)
    model = chiasm.create_model(NAME, pretrained=True)
    assert all(torch.equal(value, origin.state_dict()[key]) for key, value in model.state_dict().items())
    (folder / f"conformer-{digest}.pth").unlink()
    other = chiasm.create_model(NAME, pretrained=True, num_classes=3, in_chans=1)  # now from the cache
    assert torch.equal(other.norm.weight, origin.norm.weight)
    with pytest.raises(
        CheckpointError, match=r"do not go into it as it is built here .*chiasm\.load_weights\(model, 'h"
    ):
        chiasm.create_model(NAME, pretrained=True, coupling="none")

    monkeypatch.setattr(stated, "url", f"{address}/conformer-00000000.pth")
    (folder / "conformer-00000000.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be fetched from .*invalid hash value") as error:
        chiasm.create_model(NAME, pretrained=True)
    assert _line(error)


def test_a_source_of_ones_own_is_not_asked_for_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(1)
    origin = create_model(NAME)
    torch.save(origin.state_dict(), tmp_path / "x.pth")
    overlay = {"file": str(tmp_path / "x.pth")}
    model = chiasm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.norm.weight, origin.norm.weight)
    with pytest.raises(CheckpointError, match="cannot be fetched from the source given"):
        chiasm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "none.pth")})
