"""The server under damaged requests: what is answered, with which status, and whether it still answers at the end.

    python benchmarks/serve_fuzz.py MODEL [MODEL ...] --out FOLDER [--requests 10000] [--seed 0]

A third of the requests is made by schemathesis of the server's OpenAPI as it allows them, a third as it does not, and
a third are images of all kinds with bytes changed, cut out or doubled, as bytes, in forms, and in damaged forms. The
first two thirds are also held against the description: status, type and body of the answer must stand in it. Writes
fuzz.json and fuzz.md into FOLDER; ends with 1 where anything was answered by a 5xx or not as described, or a sound
image otherwise than before.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from chiasm.measure import machine
from serve_damage import KINDS, damaged
from serve_process import server

BYTES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def sound() -> list[bytes]:
    """Images of every kind, with and without colour, and one of many pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    made = [(Image.fromarray(pixels), kind) for kind in KINDS]
    made += [(Image.fromarray(pixels).convert(mode), "TIFF") for mode in ("L", "1", "P", "CMYK", "RGBA")]
    made += [(Image.new("RGB", (3000, 2000)), "PNG"), (Image.new("L", (100_000, 1)), "PNG")]
    images = []
    for image, kind in made:
        file = BytesIO()
        image.save(file, kind)
        images.append(file.getvalue())
    return images


def described(
    url: str, names: Sequence[str], mode: GenerationMode, count: int, number: int
) -> tuple[Counter[str], list[str]]:
    """Requests made of the OpenAPI: their statuses by route, and where an answer is not as described. Most of those
    that take a model's name are given one of `names`, which no description lists."""
    api = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=st.one_of(*(found.ok().as_strategy(mode) for found in api.get_all_operations())),
        name=st.sampled_from([*names, None]),
    )
    def send(case: schemathesis.Case, name: str | None) -> None:
        if name and case.method == "POST":
            case.query = {**(case.query or {}), "model": name}
        answer = case.call()
        seen[f"{case.method} {case.path} {answer.status_code}"] += 1
        try:
            case.validate_response(answer, checks=CHECKS)
        except Exception as error:  # schemathesis groups its failures in a type of its own
            wrong.append(f"{case.method} {case.path} {answer.status_code}: {' '.join(str(error).split())[:300]}")

    send()
    return seen, wrong


def mutated(url: str, names: Sequence[str], images: Sequence[bytes], count: int, chance: random.Random) -> Counter[str]:
    """Damaged images and forms, to every model: their statuses by route."""
    seen: Counter[str] = Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(count):
            path = chance.choice(("/v1/predict", "/v1/predict", "/v1/explain"))
            query = {"model": chance.choice(names), "overlay": chance.choice(("true", "false"))}
            some = [damaged(chance.choice(images), chance) for _ in range(chance.randint(1, 4))]
            headers = {"Accept": chance.choice(("*/*", "image/png"))}
            way = chance.randrange(3)
            if way == 0:
                headers["Content-Type"] = chance.choice(BYTES)
                answer = client.post(path, params=query, content=some[0], headers=headers)
            else:
                files = [("images", (f"{i}.png", one, "image/png")) for i, one in enumerate(some)]
                request = client.build_request("POST", path, params=query, files=files, headers=headers)
                body = request.read()
                if way == 2:
                    body = damaged(body, chance)
                headers["Content-Type"] = request.headers["Content-Type"]
                answer = client.post(path, params=query, content=body, headers=headers)
            seen[f"POST {path} {answer.status_code}"] += 1
    return seen


def resident(url: str) -> float:
    """The server's memory in bytes."""
    found = re.search(r"^process_resident_memory_bytes (\S+)$", httpx.get(f"{url}/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All requests."""
    chance, images = random.Random(options.seed), sound()
    schemathesis.openapi.format("binary", st.one_of(st.sampled_from(images), st.binary(max_size=200)))
    for kind in BYTES:
        schemathesis.openapi.media_type(kind, st.one_of(st.sampled_from(images), st.binary(max_size=200)))
    third = options.requests // 3
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        with server(*options.models, "--max-mb", "1", log=log) as url:
            names = [model["name"] for model in httpx.get(f"{url}/v1/models").json()["models"]]
            asked = [httpx.Request("POST", f"{url}/v1/predict?model={name}", content=images[0]) for name in names]
            with httpx.Client(timeout=60) as client:
                first = [client.send(request).json() for request in asked]
            memory, start = [resident(url)], time.perf_counter()
            counts["images changed"] = mutated(url, names, images, options.requests - 2 * third, chance)
            memory.append(resident(url))
            wrong: list[str] = []
            for mode, what in (
                (GenerationMode.POSITIVE, "as described"),
                (GenerationMode.NEGATIVE, "not as described"),
            ):
                counts[what], found = described(url, names, mode, third, options.seed)
                wrong += found
                memory.append(resident(url))
            seconds = time.perf_counter() - start
            with httpx.Client(timeout=60) as client:
                last = [client.send(request).json() for request in asked]
        log.seek(0)
        # Paths as they are within packages: where those lie says nothing.
        mishaps = [json.loads(re.sub(r"[^\s\"]*/site-packages/", "", line)) for line in log if line.startswith("{")]
    return {
        "date": str(date.today()),
        "machine": machine(torch.device("cpu")),
        "command": f"python benchmarks/serve_fuzz.py {' '.join(Path(model).name for model in options.models)} --out "
        f"FOLDER --requests {options.requests} --seed {options.seed}",
        "seconds": seconds,
        "counts": {what: dict(sorted(count.items())) for what, count in counts.items()},
        "not_as_described": wrong,
        "mishaps": mishaps,
        "memory": memory,
        "answers_as_before": first == last,
    }


def statuses(study: dict[str, Any]) -> Counter[str]:
    """How often each status came."""
    total: Counter[str] = Counter()
    for count in study["counts"].values():
        for what, number in count.items():
            total[what.rpartition(" ")[2]] += number
    return total


def table(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    where, total = study["machine"], statuses(study)
    broken = sum(number for status, number in total.items() if status.startswith("5"))
    memory = ", ".join(f"{one / 1e6:.0f}" for one in study["memory"])
    lines = [
        "# The server under damaged requests",
        "",
        f"{study['date']}, {where['processor']}, {where['threads']} threads. `{study['command']}`",
        "",
        f"* {sum(total.values()):,} requests in {study['seconds'] / 60:.1f} minutes: "
        + ", ".join(f"{number:,} with {status}" for status, number in sorted(total.items())),
        f"* **{broken}** answers of 5xx; {len(study['mishaps'])} lines of warnings or errors in the log",
        f"* {len(study['not_as_described'])} answers that the OpenAPI does not describe",
        f"* afterwards a sound image is answered {'as before' if study['answers_as_before'] else 'DIFFERENTLY'}",
        f"* memory (RSS) at the start and after each third: {memory} MB",
        "",
        "| requests | route and status | count |",
        "|---|---|---:|",
    ]
    for what, count in study["counts"].items():
        lines += [f"| {what} | `{route}` | {number:,} |" for route, number in count.items()]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    study = measure(options)
    (out / "fuzz.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    (out / "fuzz.md").write_text(table(study), encoding="utf-8")
    print(table(study))
    broken = any(status.startswith("5") for status in statuses(study))
    return int(broken or bool(study["not_as_described"]) or not study["answers_as_before"])


if __name__ == "__main__":
    sys.exit(main())
