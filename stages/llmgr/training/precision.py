"""The device of a stage, and the precision of its arithmetic."""
from __future__ import annotations

import functools
import time

import torch

from llmgr.runtime.console import say
from llmgr.training.distributed import from_first

FASTER = 1.3
"""bf16 must be at least this many times as fast as float32 to be worth its rounding."""


def device_of() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic(precision: str) -> torch.dtype:
    """The type for `precision`, which is fp32, bf16 or auto; `auto` takes the faster one and prints the reason.

    `auto` takes bf16 on a GPU that has it. On a CPU with AMX tiles, and on an AMD CPU with AVX-512 bf16, it measures a
    product and takes bf16 where that is at least FASTER times as fast. Intel's AVX-512 bf16 without AMX ran at 0.6 to
    1.3 times the rate of float32, which is not worth the rounding.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if torch.cuda.is_available():
        chosen, reason = torch.bfloat16, "the GPU multiplies it faster"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            chosen, reason = torch.float32, "the GPU has no bf16"
    else:
        chosen, reason = from_first(_cpu())
    say(f"precision auto: {'bf16' if chosen is torch.bfloat16 else 'fp32'} ({reason})")
    return chosen


@functools.cache
def _cpu() -> tuple[torch.dtype, str]:
    cpu = torch.cpu.get_capabilities()
    tiles, amd = cpu.get("amx_bf16", False), cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", "")
    if not (tiles or amd):
        return torch.float32, "bf16 is no faster on this CPU"
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    reason = (f"{'a CPU with AMX tiles' if tiles else 'an AMD CPU with AVX-512 bf16'}, where a product takes "
            f"{1e3 * seconds[torch.float32]:.1f} ms in fp32 and {1e3 * seconds[torch.bfloat16]:.1f} ms in bf16")
    return torch.bfloat16 if ratio >= FASTER else torch.float32, reason


def product_seconds(dtype: torch.dtype, size: int = 512, times: int = 7) -> float:
    """The time in seconds of the fastest of `times` products of two square matrices, after one to warm up."""
    left, right = torch.ones(2, size, size, dtype=dtype)
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
