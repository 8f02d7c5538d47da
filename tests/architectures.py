"""The registered architectures and how large they are: which of them a test can afford to build."""

from chiasm.models import list_models
from chiasm.models.sketch import sketch

PARAMETERS = {name: sum(p.numel() for p in sketch(name).parameters()) for name in list_models()}
ALL = list(PARAMETERS)


def below(parameters: float) -> list[str]:
    """The names of those with fewer parameters."""
    return [name for name in ALL if PARAMETERS[name] < parameters]
