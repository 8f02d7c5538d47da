"""A model optimized by chiasm beside timm's through OpenVINO, on this machine's processor, in float32.

    pip install openvino
    python benchmarks/beside_openvino.py --out FOLDER [--rounds 30]

The same weights, checked to answer alike; all in one process, in rounds that run each once unmeasured and once
measured, so that each is timed with its own weights in cache, as it is in use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from chiasm import create_model, optimize
from chiasm.measure import Times, interleaved, machine, ratio, timed

PAIRS = {
    "Swin-T": ("swin_tiny_window7_224", "swin_tiny_patch4_window7_224", 224),
    "MobileViT-S": ("mobilevit_s_256", "mobilevit_s", 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    rows = [row for name in PAIRS for batch in (1, 8) for row in measure(name, batch, args.rounds)]
    told = machine(torch.device("cpu"))
    lines = [
        "# Beside OpenVINO",
        "",
        f"`python benchmarks/beside_openvino.py --out FOLDER --rounds {args.rounds}`, {date.today()}, "
        f"{told['processor']} ({told['instructions']}), {told['threads']} threads, torch {told['torch']}, "
        f"OpenVINO {_version()}",
        "",
        "'x OpenVINO' is how many times as fast as timm's model through OpenVINO, with its 95 % interval.",
        "",
        "| model | batch | form | ms | x OpenVINO |",
        "|---|---:|---|---:|---:|",
    ]
    for row in rows:
        speed, low, high = row["speedup"]
        cells = row["model"], row["batch"], row["form"], f"{row['ms']:.1f}", f"{speed:.2f}"
        lines.append(f"| {' | '.join(map(str, cells))} ({low:.2f} to {high:.2f}) |")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "openvino.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / "openvino.json").write_text(json.dumps({"machine": told, "rows": rows}, indent=1), encoding="utf-8")
    print("\n".join(lines))


def _version() -> str:
    import openvino

    return openvino.__version__.split("-")[0]


def measure(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the three forms of one model at one batch."""
    ours, peer, side = PAIRS[name]
    torch.manual_seed(0)
    theirs = timm.create_model(peer).eval()
    model = create_model(ours).eval()
    model.load_state_dict(theirs.state_dict(), strict=False)
    images = torch.randn(batch, 3, side, side)
    faster, through_openvino = optimize(model), _openvino(theirs, images)

    works: dict[str, Callable[[], Tensor]] = {
        "timm, eager": lambda: theirs(images),
        "timm, OpenVINO": through_openvino,
        "chiasm, optimized": lambda: faster(images),
    }
    with torch.inference_mode():
        answers = [work() for work in works.values()]
        for answer in answers[1:]:
            torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=1e-4)

        rounds_of = interleaved({form: partial(_second, timed(work)) for form, work in works.items()})
        found = list(islice(rounds_of, rounds))
    times = {form: Times(tuple(seconds[form] for seconds in found)) for form in works}
    reference = times["timm, OpenVINO"]
    return [
        {"model": name, "batch": batch, "form": form, "ms": 1e3 * own.median, "speedup": ratio(reference, own)}
        for form, own in times.items()
    ]


def _second(run: Callable[[], float]) -> float:
    """Seconds of the second of two runs; the first finds the caches as others left them."""
    run()
    return run()


def _openvino(model: torch.nn.Module, images: Tensor) -> Callable[[], Tensor]:
    import openvino

    with torch.no_grad():
        converted = openvino.convert_model(model, example_input=images, input=[list(images.shape)])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    given = [images.numpy()]
    return lambda: torch.from_numpy(next(iter(request.infer(given).values())))


if __name__ == "__main__":
    main()
