"""The models of one server, by name: what each says of images, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.model_file import ModelInfo, resolve_model
from chiasm.predictor import Predictor
from chiasm.results import Classification
from chiasm.serving.refusals import Refusal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from chiasm.explaining.explainer import Explainer
    from chiasm.results import Explanation


class Served:
    """One model of a server.

    Args:
        name: what requests call it.
        ref: a model file, a run folder or an architecture's name.
        device, image_size: as for `chiasm.load`.

    Attributes:
        info: what its file says of it.
        predictor: what it sees in images.
        branches: of a classifier those that vote; known after `warm_up`.

    Raises:
        ModelFileError, UnknownNameError: when `ref` names no model.
        ChiasmError: for a device that is not here, or a size that the model cannot take.
    """

    def __init__(self, name: str, ref: str, *, device: str = "auto", image_size: int | None = None) -> None:
        self._model: nn.Module
        self._model, info = resolve_model(ref)
        self.name = name
        self.predictor = Predictor(self._model, info, device=device, image_size=image_size)
        self.branches: tuple[str, ...] = ()
        self._explainer: Explainer | None = None

    @property
    def info(self) -> ModelInfo:
        return self.predictor.info

    def warm_up(self) -> None:
        """Answer once, of nothing: the first answer takes longer than others, and tells which branches vote.

        Raises:
            ChiasmError: where it does not work at this size of images, mostly for want of memory.
        """
        import torch

        height, width = self.info.preprocess.size
        try:
            seen = self.predictor.look(torch.zeros(3, height, width, dtype=torch.uint8))
            (result,) = self.predictor.answer_seen([seen], [""])
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200].rstrip(".")
            raise ChiasmError(
                f"{self.name} cannot answer an image of {height} x {width} pixels here ({reason}); "
                "a smaller --image-size may do."
            ) from error
        self.branches = tuple(result.branches) if isinstance(result, Classification) else ()

    def explain(self, pixels: Tensor, source: str, label: str | None, top: int) -> list[Explanation]:
        """What spoke for the answer of one image, uint8 (3, H, W), as `Explainer.explain` says it.

        Raises:
            Refusal: 422 for a model that cannot be explained.
        """
        if self._explainer is None:
            from chiasm.explaining.explainer import Explainer

            self._explainer = Explainer(self._model, self.info, device=str(self.predictor.device))
        try:
            return self._explainer.explain(pixels, source, label=label, top=top)
        except ChiasmError as error:
            reason = str(error)
        raise Refusal(422, "not_explained", reason)


class Models:
    """The models by name, the first the one that answers where none is named.

    Args:
        models: in their order; their names differ.
    """

    def __init__(self, models: Sequence[Served]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def get(self, name: str | None) -> Served:
        """Raises:
        Refusal: 404 for a name that is none, with those that are.
        """
        found = next(iter(self)) if name is None else self._models.get(name)
        if found is None:
            known = ", ".join(self._models)
            raise Refusal(
                404, "unknown_model", f"{UnknownNameError('model', str(name)[:100], self._models)} Here is {known}."
            )
        return found


def named(refs: Sequence[str]) -> dict[str, str]:
    """The models that a person lists, as NAME=PATH or by a path alone, whose file or run folder then gives the name.

    Raises:
        ChiasmError: for two of one name.
    """
    models: dict[str, str] = {}
    for ref in refs:
        name, equals, path = ref.partition("=")
        # An '=' further on belongs to the path.
        if not equals or not name or "/" in name:
            path = ref
            file = Path(ref)
            name = (file.resolve().parent.name if file.name == "model.safetensors" else file.stem) or ref
            if file.is_dir():
                name = file.resolve().name
            elif "/" not in ref and not file.exists():
                name = ref  # an architecture's, with its dots
        if name in models:
            raise ChiasmError(
                f"two models would be called '{name}': {models[name]} and {path}; name one, such as other={path}"
            )
        models[name] = path
    return models
