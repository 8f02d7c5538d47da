"""The Conformer against its textbook twin (tests/conformer_textbook.py): the same network, written for no speed at all.

    python benchmarks/conformer_twin.py --out FOLDER [--seconds 240] [--batch 1 8] [--no-memory]

The twin is registered with timm, so `chiasm bench` measures it as it does any other network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

import chiasm
from chiasm.config import BenchConfig
from chiasm.models import conformer
from chiasm.verbs.bench import show

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conformer_textbook import TextbookConformer

NAME = "conformer_small_patch16_224"
TWIN = "conformer_small_textbook"


class Twin(nn.Module):
    """The textbook's network with the outputs of a model of two branches."""

    default_cfg = {"input_size": (3, 224, 224), "first_conv": "textbook.conv1"}
    pretrained_cfg = default_cfg

    def __init__(self) -> None:
        super().__init__()
        sizes = conformer.SIZES[NAME]
        self.num_classes = 1000
        self.textbook = TextbookConformer(
            patch=sizes.patch, ratio=int(sizes.channel_ratio), dim=sizes.dim, heads=sizes.heads, depth=sizes.depth,
            base=sizes.stem_chs,
        )  # fmt: skip

    def forward_branches(self, images: Tensor) -> dict[str, Tensor]:
        return self.textbook(images)

    def forward(self, images: Tensor) -> Tensor:
        conv, tokens = self.textbook(images).values()
        return (conv + tokens) / 2


def conformer_small_textbook(pretrained: bool = False, **kwargs: Any) -> Twin:
    return Twin()


# Here and not in main: the processes that are measured read this file, too, and must know the name.
timm.models.register_model(conformer_small_textbook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--batch", nargs="+", default=["1", "8"])
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    # The twin has no stochastic depth.
    flags = {"models": [NAME, f"timm:{TWIN}"], "peer": f"timm:{TWIN}", "drop_path": 0.0, **vars(parser.parse_args())}
    sys.exit(show(chiasm.bench(**flags), BenchConfig.from_flags(**flags)))


if __name__ == "__main__":
    main()
