"""The server under load: errors, throughput beside the plain predictor, latency, and memory over time.

    python benchmarks/serve_load.py MODEL IMAGES --out FOLDER [--requests 10000] [--at-once 32] [--rounds 10]

MODEL is a model file or run folder, IMAGES a folder of them. Rounds alternate: in each, so many images go through
`predictor.stream` in batches, in a process of its own, and then the same images through `chiasm serve`, an image a
request, so many requests at once over connections that are kept. The client runs on the same cores, and what it uses of
them is told. Writes load.json and load.md into FOLDER.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from datetime import date
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from chiasm.data.images import find_images
from chiasm.measure import MatrixProduct, load_average, machine, noise
from serve_process import server

DEVICE = torch.device("cpu")


def plain(model: str, batch: int, pipe: Connection) -> None:
    """A process: for each list of paths the seconds that the predictor takes for them, and of all cores together."""
    from chiasm.predictor import load

    predictor = load(model, device=str(DEVICE))
    while paths := pipe.recv():
        start, own = time.perf_counter(), time.process_time()
        count = sum(1 for _ in predictor.stream(paths, batch_size=batch))
        pipe.send((time.perf_counter() - start, time.process_time() - own))
        assert count == len(paths)


def metric(port: int, name: str) -> float:
    """One of the server's numbers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
    return 0.0


async def ask(port: int, bodies: Sequence[bytes], at_once: int) -> list[tuple[int, float]]:
    """Status and seconds of each request, `at_once` of them at a time; status 0 where the connection broke."""
    left, answers = iter(bodies), []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in left:
            start = time.perf_counter()
            head = (
                f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/x\r\nContent-Length: {len(body)}"
            )
            try:
                writer.write(f"{head}\r\n\r\n".encode() + body)
                lines = (await reader.readuntil(b"\r\n\r\n")).lower()
                status = int(lines[9:12])
                length = re.search(rb"content-length: (\d+)", lines)
                await reader.readexactly(int(length[1]) if length else 0)
            except (OSError, asyncio.IncompleteReadError):
                status = 0
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers.append((status, time.perf_counter() - start))
        writer.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return answers


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds."""
    paths = list(islice(cycle(list(find_images([options.images]))), -(-options.requests // options.rounds)))
    bodies = [Path(path).read_bytes() for path in paths]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=plain, args=(options.model, options.batch, there), daemon=True)
    process.start()
    product, load = MatrixProduct(DEVICE), load_average()
    product()
    rounds: list[dict[str, Any]] = []
    with server(options.model, "--batch", str(options.batch), "--device", str(DEVICE)) as address:
        port = int(address.rpartition(":")[2])
        # The first images settle what both keep.
        warm = min(len(paths), 4 * options.at_once)
        here.send(paths[:warm])
        here.recv()
        asyncio.run(ask(port, bodies[:warm], options.at_once))
        memory = [metric(port, "process_resident_memory_bytes")]
        for number in range(options.rounds):
            rate = product()
            here.send(paths)
            alone, alone_cpu = here.recv()
            cpu = metric(port, "process_cpu_seconds_total")
            batches = metric(port, 'chiasm_batch_images_count{lane="predict"}')
            own, start = time.process_time(), time.perf_counter()
            answers = asyncio.run(ask(port, bodies, options.at_once))
            seconds = time.perf_counter() - start
            own = time.process_time() - own
            batches = metric(port, 'chiasm_batch_images_count{lane="predict"}') - batches
            cpu = metric(port, "process_cpu_seconds_total") - cpu
            memory.append(metric(port, "process_resident_memory_bytes"))
            rounds.append(
                {
                    "plain_seconds": alone,
                    "server_seconds": seconds,
                    "plain_cpu_seconds": alone_cpu,
                    "server_cpu_seconds": cpu,
                    "client_cpu_seconds": own,
                    "images_per_batch": len(paths) / max(batches, 1),
                    "status": dict(Counter(str(status) for status, _ in answers)),
                    "latency": [round(took, 5) for _, took in answers],
                    "rate": rate,
                }
            )
            ratio = alone / seconds
            print(
                f"round {number + 1}: {len(paths) / seconds:.1f} requests/s, {ratio:.1%} of the predictor", flush=True
            )
    here.send([])
    process.join()
    return {
        "date": str(date.today()),
        "machine": machine(DEVICE),
        "command": f"python benchmarks/serve_load.py {Path(options.model).name} {Path(options.images).name} --out "
        f"FOLDER --requests {options.requests} --at-once {options.at_once} --rounds {options.rounds} --batch "
        f"{options.batch}",
        "noise": noise([one["rate"] for one in rounds], load),
        "images": len(set(paths)),
        "images_per_round": len(paths),
        "at_once": options.at_once,
        "rounds": rounds,
        "memory": memory,
    }


def table(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    where, rounds, count = study["machine"], study["rounds"], study["images_per_round"]
    took = [seconds for one in rounds for seconds in one["latency"]]
    status: Counter[str] = Counter()
    for one in rounds:
        status.update(one["status"])
    failed = sum(status.values()) - status["200"]
    ratios = [one["plain_seconds"] / one["server_seconds"] for one in rounds]
    memory = [bytes_ / 1e6 for bytes_ in study["memory"]]
    served, alone = (
        statistics.median(count / one[key] for one in rounds) for key in ("server_seconds", "plain_seconds")
    )
    images = count * len(rounds)
    cpu = {
        who: 1e3 * sum(one[f"{who}_cpu_seconds"] for one in rounds) / images for who in ("server", "plain", "client")
    }
    rows = {
        "requests": f"{len(took):,}, {study['at_once']} at a time, {study['images']:,} different images",
        "answered": ", ".join(f"{number:,} with {code}" for code, number in sorted(status.items())),
        "not answered with 200": f"{failed:,}",
        "throughput of the server": f"{served:.1f} images/s (median of {len(rounds)} rounds)",
        "throughput of the predictor": f"{alone:.1f} images/s",
        "server over predictor": f"{statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})",
        "processor time of an image": f"{cpu['server']:.1f} ms in the server, {cpu['plain']:.1f} ms in the predictor, "
        f"{cpu['client']:.1f} ms in the client",
        "images in a batch": f"{statistics.mean(one['images_per_batch'] for one in rounds):.1f}",
        "latency": f"p50 {1e3 * quantile(took, 0.5):.0f} ms, p99 {1e3 * quantile(took, 0.99):.0f} ms, "
        f"longest {1e3 * max(took):.0f} ms",
        "memory (RSS)": f"{memory[0]:.0f} MB after warming up, {memory[-1]:.0f} MB at the end",
    }
    lines = [
        "# The server under load",
        "",
        f"{study['date']}, {where['processor']} ({where['instructions']}), {where['threads']} threads, torch "
        f"{where['torch']}. `{study['command']}`",
        *(f"\nToo noisy to judge. {sentence}" for sentence in study["noise"]),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "The client runs on the same cores, and what it takes the server lacks.",
        "",
        "| round | server, images/s | predictor, images/s | p50, ms | p99, ms | memory, MB |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for number, one in enumerate(rounds, start=1):
        lines.append(
            f"| {number} | {count / one['server_seconds']:.1f} | {count / one['plain_seconds']:.1f} | "
            f"{1e3 * quantile(one['latency'], 0.5):.0f} | {1e3 * quantile(one['latency'], 0.99):.0f} | "
            f"{memory[number]:.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--out", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    study = measure(options)
    (out / "load.json").write_text(json.dumps(study), encoding="utf-8")
    (out / "load.md").write_text(table(study), encoding="utf-8")
    print(table(study))


if __name__ == "__main__":
    main()
