"""What an epoch is judged by: the same numbers from one process or several, and their names."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.tasks.classify import Classify
from chiasm.tasks.validation import SCORES, other_scores, score_of

IMAGES, CLASSES = 23, 4


def answers(branches: int) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of each branch and labels."""
    generator = torch.Generator().manual_seed(branches)
    names = ("conv", "tokens")[:branches] if branches > 1 else ("model",)
    logits = {name: torch.randn(IMAGES, CLASSES, generator=generator) for name in names}
    return logits, torch.randint(CLASSES, (IMAGES,), generator=generator)


@pytest.mark.parametrize("branches", [1, 2])
def test_classification_from_several_processes(branches: int) -> None:
    """Batches of five, dealt out to three processes; one of each batch only fills it up."""
    logits, labels = answers(branches)
    task = Classify(nn.Identity(), [str(i) for i in range(CLASSES)], label_smoothing=0.1)
    processes = [task.validation() for _ in range(3)]
    for number, start in enumerate(range(0, IMAGES, 4)):
        places = [*range(start, min(start + 4, IMAGES)), 0]
        real = torch.tensor([True] * (len(places) - 1) + [False])
        outputs = {name: values[places] for name, values in logits.items()}
        processes[number % 3].add(outputs, labels[places], real)
    states = [pickle.loads(pickle.dumps(process.state())) for process in processes]
    found = processes[1].compute(states)

    mean = torch.stack(list(logits.values())).mean(0)
    losses = [F.cross_entropy(values, labels, label_smoothing=0.1) for values in logits.values()]
    assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert found["top1"] == float((mean.argmax(1) == labels).double().mean())
    assert {name: value for name, value in found.items() if "_" in name} == {
        f"top1_{name}": float((values.argmax(1) == labels).double().mean())
        for name, values in logits.items()
        if branches > 1
    }
    assert list(found)[:2] == ["loss", task.validation().score]


def test_no_image_gives_no_number() -> None:
    task = Classify(nn.Identity(), ["a", "b"])
    empty, other = task.validation(), task.validation()
    empty.add({"model": torch.zeros(2, 2)}, torch.tensor([0, 1]), torch.tensor([False, False]))
    assert empty.compute([empty.state()]) == {}
    other.add({"model": torch.tensor([[1.0, 0.0]])}, torch.tensor([0]), torch.tensor([True]))
    assert other.compute([empty.state(), other.state()])["top1"] == 1


@pytest.mark.parametrize(
    ("columns", "score", "others"),
    [
        (
            ["epoch", "train_loss", "val_loss", "val_top1", "val_top1_conv", "val_top1_tokens", "seconds"],
            "top1",
            {"val_top1_conv": "conv", "val_top1_tokens": "tokens"},
        ),
        (["epoch", "val_loss", "val_top1"], "top1", {}),
        (["train_loss", "val_ap", "val_ap50"], "ap", {"val_ap50": "AP50"}),
        (
            ["val_ap", "val_ap50", "val_mask_ap", "val_mask_ap50"],
            "mask_ap",
            {"val_ap": "AP", "val_ap50": "AP50", "val_mask_ap50": "mask AP50"},
        ),
        (["val_miou", "val_pixel_accuracy", "val_loss"], "miou", {"val_pixel_accuracy": "pixel accuracy"}),
        (["epoch", "train_loss", "val_loss"], "", {}),
    ],
)
def test_scores_are_told_by_the_columns(columns: list[str], score: str, others: dict[str, str]) -> None:
    assert score_of(columns) == score
    assert score == "" or SCORES[score]
    assert other_scores(columns) == others
