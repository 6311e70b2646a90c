"""Where and in which arithmetic a stage computes."""
from __future__ import annotations

import torch

from llmgr.runtime.console import say


def device_of() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arithmetic(precision: str) -> torch.dtype:
    """float32 or bfloat16 for `precision`; `auto` takes bf16 where the machine multiplies it faster, and says why.

    That is a GPU, a CPU with AMX tiles, and an AMD one with AVX-512 bf16 (2.3 to 2.5 times the fp32 rate on two threads
    of a Zen 4). Intel's AVX-512 bf16 without AMX ran at 0.6 to 1.3 times that rate: not worth the rounding.
    """
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if torch.cuda.is_available():
        chosen, reason = torch.bfloat16, "the GPU multiplies it faster"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            chosen, reason = torch.float32, "the GPU has no bf16"
    else:
        cpu = torch.cpu.get_capabilities()
        amd = cpu.get("avx512_bf16", False) and "AMD" in cpu.get("cpu_name", "")
        chosen = torch.bfloat16 if amd or cpu.get("amx_bf16", False) else torch.float32
        reason = {(True, True): "the CPU has AMX tiles", (True, False): "an AMD CPU with AVX-512 bf16"}.get(
            (chosen is torch.bfloat16, bool(cpu.get("amx_bf16", False))), "bf16 is no faster on this CPU")
    say(f"precision auto: {'bf16' if chosen is torch.bfloat16 else 'fp32'} ({reason})")
    return chosen
