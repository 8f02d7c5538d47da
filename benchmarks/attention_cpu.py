"""Forward and backward of PyTorch's fused attention on the CPU in bf16 and in float32, for the sequences of our models.

    python benchmarks/attention_cpu.py

Interleaved rounds in one process; the ratio of medians is the figure, the milliseconds only say what was compared.
Its output is kept in attention_cpu.txt.
"""

from __future__ import annotations

import platform
import statistics
import time
from datetime import date

import torch
import torch.nn.functional as F

ROUNDS, BATCH, HEADS, WIDTH = 15, 64, 4, 32


def once(tokens: int, dtype: torch.dtype) -> float:
    """Milliseconds of one forward and backward; the float32 one starts and ends in bf16, as under autocast."""
    qkv = torch.randn(BATCH, tokens, 3, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    start = time.perf_counter()
    query, key, value = qkv.to(dtype).permute(2, 0, 3, 1, 4)
    F.scaled_dot_product_attention(query, key, value).to(torch.bfloat16).sum().backward()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    print(f"{date.today()}  {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("tokens  bf16 ms  float32 ms  bf16 / float32")
    for tokens in (37, 65, 197):
        times: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
        for _ in range(ROUNDS):
            for dtype, seen in times.items():
                seen.append(once(tokens, dtype))
        slow, fast = (statistics.median(seen[2:]) for seen in times.values())
        print(f"{tokens:6d}  {slow:7.1f}  {fast:10.1f}  {slow / fast:14.2f}")
