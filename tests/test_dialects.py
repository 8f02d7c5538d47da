"""Every dialect of every architecture: its table both ways, and the other libraries' own models with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from chiasm.models import ARCHITECTURES, conformer, create_model, mobilevit, mobilevitv2, swin
from chiasm.models.checkpoints import load_weights, read_weights
from chiasm.models.dialects import Dialect, Place
from chiasm.models.sketch import sketch

TABLES = [(module, dialect) for module in ARCHITECTURES for dialect in module.DIALECTS]
EVERY = [
    pytest.param(name, dialect, id=f"{name}-{dialect.name}") for module, dialect in TABLES for name in module.SIZES
]


def _smallest(module: Any) -> str:
    return min(module.SIZES, key=lambda name: sum(p.numel() for p in sketch(name).parameters()))


def _shaken(model: nn.Module, seed: int) -> nn.Module:
    """Other numbers in every weight and statistic, norms and biases too, so that each one left out or swapped shows."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point():
            scale = 0.3 if value.ndim < 2 else 1.5 / max(1, value[0].numel()) ** 0.5
            value.normal_(std=scale, generator=generator)
            if value.ndim == 1 and key.endswith("weight"):
                value.add_(1)
    return model.eval()


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def _equal(first: Tensor, second: Tensor) -> None:
    scale = second.abs().max().item()
    torch.testing.assert_close(first / scale, second / scale, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- tables, both directions


def _options(dialect: Dialect) -> dict[str, Any]:
    """Detectors have a norm on every level, for which our Swin has an option, and none behind the last stage alone."""
    return {"out_norms": True} if dialect is swin.DIALECTS[3] else {}


@pytest.mark.parametrize(("name", "dialect"), EVERY)
def test_the_table_names_every_weight_both_ways(name: str, dialect: Dialect) -> None:
    keys = list(sketch(name, **_options(dialect)).state_dict())
    if _options(dialect):
        keys = [key for key in keys if not key.startswith("norm.")]
    theirs = {key: dialect.to_theirs(key) for key in keys}
    assert not [key for key, names in theirs.items() if not names]
    assert len({n for names in theirs.values() for n in names}) == sum(map(len, theirs.values()))
    for key, names in theirs.items():
        assert [dialect.to_ours(n) for n in names] == [Place(key, i, len(names)) for i in range(len(names))]


@pytest.mark.parametrize(("module", "dialect"), TABLES, ids=lambda value: getattr(value, "name", None))
def test_a_checkpoint_of_theirs_gives_the_same_model(module: Any, dialect: Dialect) -> None:
    name = _smallest(module)
    origin = _shaken(create_model(name, num_classes=5, **_options(dialect)), seed=1)
    state = dialect.write(origin.state_dict())
    model = create_model(name, num_classes=5, **_options(dialect)).eval()
    report = load_weights(model, state)
    assert report.naming == dialect.name
    if _options(dialect):
        assert report.missing == ("norm.weight", "norm.bias")
        model.norm.load_state_dict(origin.norm.state_dict())
    else:
        assert not report.missing
    assert not report.left_out
    assert sorted([*report.loaded, *report.renamed, *report.adapted]) == sorted(state)
    side = model.pretrained_cfg["input_size"][-1] // 2
    images = torch.randn(2, 3, side, side)
    assert torch.equal(_logits(model, images), _logits(origin, images))


@pytest.mark.parametrize(("module", "dialect"), TABLES, ids=lambda value: getattr(value, "name", None))
def test_timms_own_loading_reads_them_too(module: Any, dialect: Dialect) -> None:
    name = _smallest(module)
    origin = _shaken(create_model(name, num_classes=5), seed=1)
    state = dialect.write(origin.state_dict())
    tables = [key for key in state if key.endswith("_bias_table")]
    state |= {key.replace("bias_table", "index"): torch.zeros(3) for key in tables}  # a buffer, to be dropped
    if _options(dialect):
        state |= {"backbone.norm3.weight": origin.norm.weight, "backbone.norm3.bias": origin.norm.bias}
    overlay = {"state_dict": {"state_dict": state}, "num_classes": 5}
    model = timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, origin.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("module", ARCHITECTURES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_no_two_dialects_are_confused(module: Any) -> None:
    """Whose names they are is found from the keys alone, behind any prefix, with or without the classifier."""
    name = _smallest(module)
    for dialect in module.DIALECTS:
        model = sketch(name, **_options(dialect))
        theirs = dialect.write(model.state_dict())
        bare = {key: value for key, value in theirs.items() if "head" not in key and "classifier" not in key}
        for content in (theirs, {f"module.{key}": value for key, value in theirs.items()}, bare):
            reading = read_weights(model, content)
            assert reading.naming == dialect.name
            assert {key for weight in reading.weights.values() for key in weight.keys} == set(content)


# Written by hand from the other code bases: our name, then theirs, dialect by dialect; '-' for none.
PUBLISHED = {
    conformer: """
        stem.bn.running_var                     bn1.running_var                          backbone.bn1.running_var
        patch_embed.bias                        trans_patch_conv.bias                    backbone.trans_patch_conv.bias
        blocks.0.conv_in.shortcut_bn.bias       conv_1.residual_bn.bias
            backbone.conv_1.residual_bn.bias
        blocks.0.transformer.norm1.weight       trans_1.norm1.weight                     backbone.trans_1.ln1.weight
        blocks.11.transformer.mlp.fc1.bias      conv_trans_12.trans_block.mlp.fc1.bias
            backbone.conv_trans_12.trans_block.ffn.layers.0.0.bias
        blocks.1.transformer.mlp.fc2.weight     conv_trans_2.trans_block.mlp.fc2.weight
            backbone.conv_trans_2.trans_block.ffn.layers.1.weight
        blocks.4.down.norm.weight               conv_trans_5.squeeze_block.ln.weight
            backbone.conv_trans_5.squeeze_block.ln.weight
        norm.weight                             trans_norm.weight                        backbone.trans_norm.weight
        heads.conv.weight                       conv_cls_head.weight                     head.conv_cls_head.weight
        heads.tokens.bias                       trans_cls_head.bias                      head.trans_cls_head.bias
    """,
    mobilevit: """
        stem.conv.weight                        conv_1.block.conv.weight
            mobilevit.conv_stem.convolution.weight          backbone.stem.conv.weight
        stages.1.2.conv3_1x1.bn.running_mean    layer_2.2.block.red_1x1.block.norm.running_mean
            mobilevit.encoder.layer.1.layer.2.reduce_1x1.normalization.running_mean
            backbone.layers.1.2.conv.2.bn.running_mean
        stages.2.0.conv2_kxk.conv.weight        layer_3.0.block.conv_3x3.block.conv.weight
            mobilevit.encoder.layer.2.downsampling_layer.conv_3x3.convolution.weight
            backbone.layers.2.0.conv.1.conv.weight
        stages.2.1.conv_kxk.conv.weight         layer_3.1.local_rep.conv_3x3.block.conv.weight
            mobilevit.encoder.layer.2.conv_kxk.convolution.weight
            backbone.layers.2.1.local_rep.0.conv.weight
        stages.3.1.conv_1x1.weight              layer_4.1.local_rep.conv_1x1.block.conv.weight
            mobilevit.encoder.layer.3.conv_1x1.convolution.weight
            backbone.layers.3.1.local_rep.1.conv.weight
        stages.3.1.norm.bias                    layer_4.1.global_rep.4.bias
            mobilevit.encoder.layer.3.layernorm.bias        backbone.layers.3.1.global_rep.4.bias
        stages.4.1.transformer.2.attn.proj.bias layer_5.1.global_rep.2.pre_norm_mha.1.out_proj.bias
            mobilevit.encoder.layer.4.transformer.layer.2.attention.output.dense.bias
            backbone.layers.4.1.global_rep.2.attn.proj.bias
        stages.4.1.transformer.0.mlp.fc2.bias   layer_5.1.global_rep.0.pre_norm_ffn.4.bias
            mobilevit.encoder.layer.4.transformer.layer.0.output.dense.bias
            backbone.layers.4.1.global_rep.0.ffn.layers.1.bias
        stages.4.1.conv_fusion.bn.weight        layer_5.1.fusion.block.norm.weight
            mobilevit.encoder.layer.4.fusion.normalization.weight
            backbone.layers.4.1.conv_fusion.bn.weight
        final_conv.conv.weight                  conv_1x1_exp.block.conv.weight
            mobilevit.conv_1x1_exp.convolution.weight       backbone.conv_1x1_exp.conv.weight
        head.fc.bias                            classifier.fc.bias      classifier.bias     head.fc.bias
    """,
    mobilevitv2: """
        stages.2.1.conv_1x1.weight              layer_3.1.local_rep.1.block.conv.weight
            mobilevitv2.encoder.layer.2.conv_1x1.convolution.weight
        stages.2.1.transformer.0.attn.qkv_proj.bias
            layer_3.1.global_rep.0.pre_norm_attn.1.qkv_proj.block.conv.bias
            mobilevitv2.encoder.layer.2.transformer.layer.0.attention.qkv_proj.convolution.bias
        stages.3.1.transformer.3.mlp.fc2.weight
            layer_4.1.global_rep.3.pre_norm_ffn.3.block.conv.weight
            mobilevitv2.encoder.layer.3.transformer.layer.3.ffn.conv2.convolution.weight
        stages.3.1.conv_proj.bn.bias            layer_4.1.conv_proj.block.norm.bias
            mobilevitv2.encoder.layer.3.conv_projection.normalization.bias
        head.fc.bias                            classifier.1.bias       classifier.bias
    """,
    swin: """
        patch_embed.proj.bias                   patch_embed.proj.bias   features.0.0.bias
            backbone.patch_embed.projection.bias            backbone.patch_embed.projection.bias
            swin.embeddings.patch_embeddings.projection.bias
            swin.embeddings.patch_embeddings.projection.bias
        layers.2.downsample.norm.weight         layers.1.downsample.norm.weight     features.4.norm.weight
            backbone.stages.1.downsample.norm.weight        backbone.stages.1.downsample.norm.weight
            swin.encoder.layers.1.downsample.norm.weight    swin.encoder.layers.1.downsample.norm.weight
        layers.2.blocks.5.mlp.fc2.weight        layers.2.blocks.5.mlp.fc2.weight    features.5.5.mlp.3.weight
            backbone.stages.2.blocks.5.ffn.layers.1.weight  backbone.stages.2.blocks.5.ffn.layers.1.weight
            swin.encoder.layers.2.blocks.5.output.dense.weight
            swin.encoder.layers.2.blocks.5.mlp.fc2.weight
        layers.0.blocks.1.attn.relative_position_bias_table
            layers.0.blocks.1.attn.relative_position_bias_table
            features.1.1.attn.relative_position_bias_table
            backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table
            backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table
            swin.encoder.layers.0.blocks.1.attention.self.relative_position_bias_table
            swin.encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table
        layers.3.blocks.0.attn.proj.bias        layers.3.blocks.0.attn.proj.bias    features.7.0.attn.proj.bias
            backbone.stages.3.blocks.0.attn.w_msa.proj.bias backbone.stages.3.blocks.0.attn.w_msa.proj.bias
            swin.encoder.layers.3.blocks.0.attention.output.dense.bias
            swin.encoder.layers.3.blocks.0.attention.o_proj.bias
        norm.weight         norm.weight         norm.weight     backbone.norm3.weight   -
            swin.layernorm.weight               swin.layernorm.weight
        out_norms.0.bias    norm0.bias          -               -                   backbone.norm0.bias
            hidden_states_norms.stage1.bias     hidden_states_norms.stage1.bias
        head.fc.weight      head.weight         head.weight     head.fc.weight      head.fc.weight
            classifier.weight                   classifier.weight
    """,
}


@pytest.mark.parametrize("module", PUBLISHED, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_names_are_the_published_ones(module: Any) -> None:
    words = iter(PUBLISHED[module].split())
    for ours in words:
        for dialect in module.DIALECTS:
            assert ("".join(dialect.to_theirs(ours)) or "-") == next(words)


def test_what_is_none_of_theirs() -> None:
    authors = conformer.DIALECTS[0]
    assert authors.to_ours("optimizer.state") is None
    assert authors.to_ours("conv_trans_12x.cnn_block.conv1.weight") is None
    assert authors.to_ours("conv_trans_0.cnn_block.conv1.weight") is None  # blocks count from 1
    assert authors.to_theirs("blocks.x.conv_in") == ()


# ------------------------------------------------------------------------------------------ the other libraries' models


def _same_logits(theirs: nn.Module, name: str, state: dict[str, Tensor], *, bgr: bool = False, **options: Any) -> None:
    """Our model with their weights answers as theirs does; one that reads BGR is shown the same image as BGR."""
    model = create_model(name, num_classes=5, **options).eval()
    report = load_weights(model, state)
    assert not report.missing
    side = model.pretrained_cfg["input_size"][-1]
    images = torch.rand(2, 3, side, side)
    expected = _logits(theirs, images.flip(1) if bgr else images)
    assert expected.std() > 0.01  # not the same whatever comes in
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)
    _equal(_logits(model, images), expected)


XXS = {"hidden_sizes": [64, 80, 96], "neck_hidden_sizes": [16, 16, 24, 48, 64, 80, 320], "expand_ratio": 2.0}


@pytest.mark.parametrize(("name", "sizes"), [("mobilevit_xxs_256", XXS), ("mobilevit_s_256", {})], ids=["xxs", "s"])
def test_hugging_faces_mobilevit(name: str, sizes: dict[str, Any]) -> None:
    from transformers import MobileViTConfig, MobileViTForImageClassification

    theirs = _shaken(MobileViTForImageClassification(MobileViTConfig(num_labels=5, **sizes)), seed=1)
    _same_logits(theirs, name, theirs.state_dict(), bgr=True)
    bare = {key.removeprefix("mobilevit."): value for key, value in theirs.state_dict().items()}
    _same_logits(theirs, name, bare, bgr=True)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_hugging_faces_mobilevitv2(width: float) -> None:
    """Its published weights are the authors', who trained the second version on RGB."""
    from transformers import MobileViTV2Config, MobileViTV2ForImageClassification

    theirs = _shaken(MobileViTV2ForImageClassification(MobileViTV2Config(num_labels=5, width_multiplier=width)), seed=1)
    _same_logits(theirs, f"mobilevitv2_{int(100 * width):03d}_256", theirs.state_dict())


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_s", "mobilevitv2_050"])
def test_timms_mobilevit(name: str) -> None:
    theirs = _shaken(timm.create_model(name, num_classes=5), seed=1)
    _same_logits(theirs, f"{name}_256", theirs.state_dict())


NANO = "swin_nano_window4_128"


def _nano(window: int = 4) -> dict[str, Any]:
    sizes = swin.SIZES[NANO]
    return {
        "embed_dim": sizes.embed_dim,
        "depths": list(sizes.depths),
        "num_heads": list(sizes.num_heads),
        "window_size": window,
    }


def test_torchvisions_swin() -> None:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {**_nano(), "window_size": [4, 4], "patch_size": [4, 4], "num_classes": 5}
    theirs = _shaken(SwinTransformer(**sizes), seed=1)
    _same_logits(theirs, NANO, theirs.state_dict())


def test_hugging_faces_swin_in_both_spellings(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import SwinConfig, SwinForImageClassification

    theirs = _shaken(SwinForImageClassification(SwinConfig(image_size=128, num_labels=5, **_nano())), seed=1)
    theirs.save_pretrained(tmp_path)
    in_file, in_memory = load_file(tmp_path / "model.safetensors"), theirs.state_dict()
    spellings = {"attention.self.query.weight", "attention.q_proj.weight"}
    assert spellings == {spelling for spelling in spellings for key in (*in_file, *in_memory) if key.endswith(spelling)}
    for state in (in_file, in_memory, {key.removeprefix("swin."): value for key, value in in_file.items()}):
        _same_logits(theirs, NANO, state)


def test_hugging_faces_swin_as_a_backbone() -> None:
    from transformers import SwinBackbone, SwinConfig

    levels = ["stage1", "stage2", "stage3", "stage4"]
    theirs = _shaken(SwinBackbone(SwinConfig(image_size=128, out_features=levels, **_nano())), seed=1)
    model = timm.create_model(NANO, features_only=True, out_norms=True).eval()
    report = load_weights(model, theirs.state_dict())
    assert not [key for key in report.missing if not key.startswith("head.")]
    images = torch.rand(2, 3, 160, 192)  # the last two stages are padded to whole windows
    with torch.no_grad():
        for ours, expected in zip(model(images), theirs(images).feature_maps, strict=True):
            _equal(ours, expected)


def test_timms_swin() -> None:
    theirs = _shaken(timm.create_model("swin_tiny_patch4_window7_224", img_size=128, num_classes=5, **_nano()), seed=1)
    _same_logits(theirs, NANO, theirs.state_dict())


class UnfoldedMerging(nn.Module):
    """Patch merging as OpenMMLab does it: nn.Unfold, norm, linear; map (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        columns = nn.functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(columns)).unflatten(1, (x.shape[1] // 2, x.shape[2] // 2))


def test_openmmlabs_patch_merging_gives_the_same_map() -> None:
    dim = swin.SIZES[NANO].embed_dim
    theirs = _shaken(UnfoldedMerging(dim), seed=1)
    state = swin.DIALECTS[2].write(sketch(NANO).state_dict())
    state = {key: torch.zeros(value.shape) for key, value in state.items()}
    state |= {f"backbone.stages.0.downsample.{key}": value for key, value in theirs.state_dict().items()}
    model = create_model(NANO).eval()
    report = load_weights(model, state)
    assert report.adapted["backbone.stages.0.downsample.reduction.weight"] == (
        "layers.1.downsample.reduction.weight",
        "patch merging from the order of nn.Unfold",
    )
    x = torch.randn(2, 6, 8, dim)
    with torch.no_grad():
        _equal(model.layers[1].downsample(x), theirs(x))
        in_our_order = UnfoldedMerging(dim)
        in_our_order.load_state_dict(model.layers[1].downsample.state_dict())
        assert not torch.allclose(in_our_order(x), theirs(x), atol=0.1)  # the order matters
