"""The model file: weights with all that is needed to use them, in one .safetensors file and without any code.

Its metadata holds one JSON text: the architecture and its arguments, the task, the class names, the preprocessing and
the data. `resolve_model` turns what a person names (a model file, a run folder, an architecture) into a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import chiasm
from chiasm.config import Preprocess
from chiasm.errors import ChiasmError, ModelFileError, nearest
from chiasm.models import create_model, is_model, list_models
from chiasm.models.checkpoints import input_channels
from chiasm.models.heads import HEADS, with_head

FORMAT = 1
METADATA_KEY = "chiasm"
RUN_FILE = "model.safetensors"
TASKS = ("classify", *HEADS)
TRAINING_SUFFIXES = (".ckpt", ".pth", ".pt", ".tar", ".bin")

# Arguments of timm's create_model that reach for other files or the network: a model file never needs them.
_NOT_IN_A_FILE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model file says of its weights.

    Attributes:
        architecture: name as in `chiasm models --all`.
        model_args: arguments that build the model again, without `num_classes`; plain JSON values.
        task: what the model does: 'classify', 'detect', 'instances' or 'segment'.
        head: what stands on the architecture where the task is not 'classify': arguments of `chiasm.models.with_head`.
        labels: the class names in the order of the logits.
        preprocess: how an image becomes the input.
        data: what it was trained on, as it was named to `train`.
        seed, val_fraction: how its val split was drawn, where the data had none of its own.
        fingerprint: of the images it was trained and validated on (`ImageData.fingerprint`).
        trained: False for random weights.
    """

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    task: str = "classify"
    head: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...]
    preprocess: Preprocess
    data: str | None = None
    seed: int | None = None
    val_fraction: float | None = None
    fingerprint: str | None = None
    trained: bool = True


def save_model(path: str | Path, model: nn.Module, info: ModelInfo) -> None:
    """Write `model` and `info` to one .safetensors file; what was at `path` stays until the new file is complete.

    Raises:
        ModelFileError: when it cannot be written, a full disk above all.
    """
    target = Path(path)
    content = {"format": FORMAT, "chiasm": chiasm.__version__, **asdict(info)}
    state = getattr(model, "_orig_mod", model).state_dict()  # torch.compile wraps the model
    # Tied weights are written once for each name: every entry owns its memory.
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    written = save(tensors, metadata={METADATA_KEY: json.dumps(content, ensure_ascii=False)})
    part = target.with_name(f".{target.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(written)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        kept = "the file that was there is intact" if target.is_file() else "nothing was left behind"
        raise ModelFileError(
            f"{target}: cannot write the model file of {len(written) / 1e6:.1f} MB ({error.strerror}); {kept}."
        ) from error


def load_model(path: str | Path) -> tuple[nn.Module, ModelInfo]:
    """Build the model of a file and load its weights, in evaluation mode on the CPU. No code is run from the file.

    Raises:
        ModelFileError: for a file that is missing, cut off, not a model file, of a newer format, of an unknown
            architecture, or whose weights are not those of its architecture.
    """
    path = Path(path)
    info, tensors = _read(path)
    if not is_model(info.architecture):
        near = nearest(info.architecture, list_models(all=True))
        hint = f"; the nearest names here are {', '.join(near)}" if near else ""
        raise ModelFileError(
            f"{path}: its architecture '{info.architecture}' is not known to this chiasm {chiasm.__version__} and "
            f"timm {timm.__version__}{hint}. Update both"
        )
    try:
        model = _build(info)
    except (TypeError, ValueError, RuntimeError, ChiasmError) as error:
        reason = str(error).splitlines()[0]
        raise ModelFileError(
            f"{path}: {info.architecture} cannot be built with the file's arguments {info.model_args | info.head} "
            f"({reason})."
        ) from error
    _check_fit(path, info.architecture, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model.eval(), info


def _build(info: ModelInfo) -> nn.Module:
    if info.task == "classify":
        return create_model(info.architecture, num_classes=len(info.labels), **info.model_args)
    backbone = create_model(info.architecture, num_classes=0, **info.model_args)
    return with_head(backbone, len(info.labels), task=info.task, architecture=info.architecture, **info.head)


def resolve_model(ref: str | Path, **create_kwargs: Any) -> tuple[nn.Module, ModelInfo]:
    """The model that `ref` names, in evaluation mode on the CPU.

    Args:
        ref: a model file, a run folder, or an architecture's name; the last gives random weights (`info.trained` is
            False) and the labels 'class 0', 'class 1' ...
        create_kwargs: arguments for an architecture's name (`num_classes`, `in_chans`, `pretrained`, its own options);
            None means not given. A model file or run folder takes none: it carries its own.

    Raises:
        ModelFileError: for a file or folder that is not one of these, or a path that does not exist.
        UnknownNameError: for a name that is no architecture, with the nearest.
        ChiasmError: for `create_kwargs` beside a file, or that the architecture does not take.
    """
    given = {name: value for name, value in create_kwargs.items() if value is not None}
    file = find_file(str(ref))
    if file is not None:
        if given:
            raise ChiasmError(f"{ref}: a model file carries its own {', '.join(given)}; leave that out.")
        return load_model(file)
    try:
        model = create_model(str(ref), **given)
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ChiasmError(f"{ref} cannot be built with {given}: {reason}.") from error
    pretrained = bool(given.pop("pretrained", False))
    given.pop("num_classes", None)
    info = ModelInfo(
        architecture=str(ref),
        model_args=given,
        labels=tuple(f"class {i}" for i in range(getattr(model, "num_classes", 0))),
        preprocess=preprocess_of(model),
        trained=pretrained,
    )
    return model.eval(), info


def preprocess_of(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Preprocess:
    """The preprocessing that a timm model states in its `pretrained_cfg`.

    Args:
        model: a timm model.
        image_size: side, or height and width, in pixels in place of the model's own. The share `crop` stays as stated.

    Returns:
        With one mean and std per input channel: for other than three channels, their average over the stated ones.
    """
    stated = getattr(model, "pretrained_cfg", None) or {}
    size = image_size or tuple(stated.get("input_size", (3, 224, 224))[-2:])
    mean, std = (tuple(stated.get(key) or getattr(Preprocess, key)) for key in ("mean", "std"))
    channels = input_channels(model)
    if channels != len(mean):
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
    return Preprocess(
        size=(size, size) if isinstance(size, int) else size,
        crop=float(stated.get("crop_pct") or 1.0),
        interpolation="bilinear" if stated.get("interpolation") == "bilinear" else "bicubic",
        mean=mean,
        std=std,
    )


def find_file(ref: str) -> Path | None:
    """The model file that `ref` names; None when it can only be an architecture's name."""
    path = Path(ref).expanduser()
    if path.is_dir():
        if (path / RUN_FILE).is_file():
            return path / RUN_FILE
        if is_model(ref):
            return None  # a folder that happens to be called like an architecture
        if (path / "config.yaml").is_file():
            raise ModelFileError(
                f"{path}: this run has no {RUN_FILE} yet, it stopped before its first epoch was measured. "
                f"Continue it: chiasm train --resume {path}"
            )
        raise ModelFileError(f"{path}: expected a run folder, which holds {RUN_FILE}; saw a folder without it.")
    if path.suffix.lower() in TRAINING_SUFFIXES and path.is_file():
        run = path.parent.parent / RUN_FILE
        if path.parent.name == "checkpoints" and run.is_file():
            raise ModelFileError(f"{path}: a training checkpoint; give its run folder instead: {run.parent}")
        raise ModelFileError(
            f"{path}: a checkpoint of weights alone, which does not say its architecture or classes. Make it a model "
            f"file: chiasm weights {path} --out model.safetensors; or start training from it: chiasm train DATA "
            f"--model NAME --weights {path}"
        )
    if path.is_file():
        return path
    looks_like_path = any(mark in ref for mark in ("/", os.sep)) or path.suffix.lower() in (
        ".safetensors",
        *TRAINING_SUFFIXES,
    )
    if looks_like_path and not is_model(ref):
        raise ModelFileError(
            f"{ref}: no such file or folder; expected a model file, a run folder or an architecture's name "
            "(chiasm models)."
        )
    return None


def _read(path: Path) -> tuple[ModelInfo, dict[str, Tensor]]:
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file.")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            info = _parse(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ModelFileError(
            f"{path}: not a complete .safetensors file ({size} bytes, {str(error).splitlines()[0]}); it was cut off or "
            "is another kind of file. Copy or train it again."
        ) from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return info, tensors


def _parse(path: Path, metadata: Mapping[str, str]) -> ModelInfo:
    if METADATA_KEY not in metadata:
        raise ModelFileError(
            f"{path}: .safetensors weights without chiasm's description (architecture, classes, preprocessing). Make "
            f"them a model file: chiasm weights {path} --out model.safetensors; or start training from them: chiasm "
            f"train DATA --model NAME --weights {path}"
        )
    try:
        content = json.loads(metadata[METADATA_KEY])
        version = int(content["format"])
        if version > FORMAT:
            raise ModelFileError(
                f"{path}: model file of format {version}, this chiasm reads up to {FORMAT}. Update chiasm"
            )
        info = ModelInfo(
            architecture=str(content["architecture"]),
            model_args=dict(content["model_args"]),
            task=_parse_task(content["task"]),
            head=dict(content.get("head", {})),
            labels=tuple(str(label) for label in content["labels"]),
            preprocess=_parse_preprocess(content["preprocess"]),
            data=content["data"],
            seed=content.get("seed"),
            val_fraction=content.get("val_fraction"),
            fingerprint=content.get("fingerprint"),
            trained=bool(content["trained"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: its description is damaged ({type(error).__name__}: {error}).") from error
    refused = sorted(_NOT_IN_A_FILE & set(info.model_args))
    if refused:
        raise ModelFileError(f"{path}: its description asks for {', '.join(refused)}, which a model file may not.")
    return info


def _parse_task(task: Any) -> str:
    if task not in TASKS:
        raise ValueError(f"task '{task}', expected one of {', '.join(TASKS)}")
    return str(task)


def _parse_preprocess(content: Mapping[str, Any]) -> Preprocess:
    height, width = (int(side) for side in content["size"])
    interpolation = content["interpolation"]
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation '{interpolation}'")
    return Preprocess(
        size=(height, width),
        crop=float(content["crop"]),
        interpolation=interpolation,
        mean=tuple(float(value) for value in content["mean"]),
        std=tuple(float(value) for value in content["std"]),
    )


def _check_fit(path: Path, architecture: str, expected: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    """Every weight there, none besides, each of its shape; all is checked before anything is loaded."""
    wrong = [f"'{key}' is missing" for key in expected if key not in seen]
    wrong += [f"'{key}' is not a weight of it" for key in seen if key not in expected]
    wrong += [
        f"'{key}' has shape {tuple(seen[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in seen and seen[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelFileError(f"{path}: the weights are not those of {architecture}: {wrong[0]}{more}.")
