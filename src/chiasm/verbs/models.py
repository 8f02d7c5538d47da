"""chiasm models: the architectures there are."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import timm
from rich.console import Console
from rich.table import Table

from chiasm.config import ModelsConfig
from chiasm.errors import ChiasmError, UnknownNameError
from chiasm.models import list_models
from chiasm.models.sketch import sketch


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        name: what `create_model` and `--model` take.
        size: height and width in pixels that it is made for; others are taken where the architecture can.
        parameters: weights with its own number of classes; None for timm's, which are not built to be listed.
        note: one line on it.
        pretrained: whether published weights are known (`--pretrained`).
    """

    name: str
    size: tuple[int, int] | None
    parameters: int | None
    note: str
    pretrained: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def models(**flags: Any) -> list[Architecture]:
    """The architectures whose name matches; the flags are the fields of `ModelsConfig`.

    Raises:
        UnknownNameError: when none does, with the nearest names.
    """
    config = ModelsConfig.from_flags(**flags)
    names = list_models(config.pattern, all=config.all)
    if not names:
        if not config.all and (others := list_models(config.pattern, all=True)):
            raise ChiasmError(
                f"no architecture of chiasm matches '{config.pattern}', but {len(others)} of timm's do, "
                f"such as {others[0]}: add --all"
            )
        raise UnknownNameError("model", config.pattern, list_models(all=True), "See 'chiasm models --all'.")
    ours = set(list_models())
    return [_look_up(name, ours=name in ours) for name in names]


def show(result: list[Architecture], config: ModelsConfig) -> int:
    """Print the architectures as a table, or as JSON."""
    if config.format == "json":
        print(json.dumps([item.to_dict() for item in result], indent=2))
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("input", justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    table.add_column("note", overflow="fold")
    for item in result:
        size = f"{item.size[0]}x{item.size[1]}" if item.size else ""
        parameters = "" if item.parameters is None else f"{item.parameters / 1e6:.1f} M"
        table.add_row(item.name, parameters, size, "published" if item.pretrained else "-", item.note)
    console = Console()
    console.print(table, highlight=False)
    if not config.pattern:
        console.print("any two coupled: CONV+TRANSFORMER:FUSION, such as resnet18+vit_tiny_patch16_224:mid")
    return 0


def _look_up(name: str, *, ours: bool) -> Architecture:
    stated = timm.models.get_pretrained_cfg(name)
    parameters = None
    if ours:
        parameters = sum(p.numel() for p in sketch(name).parameters())
    return Architecture(
        name=name,
        size=(stated.input_size[-2], stated.input_size[-1]) if stated else None,
        parameters=parameters,
        note=_note(name) if ours else "timm's",
        pretrained=bool(stated and (stated.url or stated.hf_hub_id)),
    )


def _note(name: str) -> str:
    """The first line of the docstring of the function that builds it, less what has a column of its own."""
    first = (timm.models.model_entrypoint(name).__doc__ or "").strip().splitlines()[0]
    return re.sub(r", [\d.]+ M parameters\.$", ".", first)
