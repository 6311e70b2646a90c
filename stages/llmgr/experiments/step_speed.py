"""How near stage 2 comes to what the machine can do: its arithmetic against the rate of plain matrix products."""
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llmgr.model.behaviour import BehaviourJob
from llmgr.model.llmgr import Llmgr

SHAPES = ((2048, 2048, 2048), (2048, 384, 384), (2048, 384, 1536), (2048, 1536, 384))
GPU_SHAPES = ((8192, 8192, 8192), (8192, 4096, 11008))
TIMES = 3  # that a step is timed
AT_A_TIME = 10  # products between two looks at a GPU's clock
PRODUCTS = ("mm", "addmm", "addmm_", "linear", "linear_cross_entropy")
KERNELS = {"fmha": "attention", "flash": "attention", "softmax": "attention", "gemm": "matrix products",
           "nvjet": "matrix products", "cutlass": "matrix products", "cublas": "matrix products",
           "splitk": "matrix products", "multi_tensor": "optimiser", "memcpy": "copies", "memset": "copies",
           "triton": "compiled kernels"}
WORDS = {"apart": "attention", "adapted": "sums (residuals, adapters, biases)",
         "softmax": "attention", "bmm": "attention", "scaled_dot_product": "attention",
         "gelu": "activations", "silu": "activations", "norm": "layer norms",
         "index": "gathering slots and items", "scatter": "gathering slots and items", "sort": "making prompts",
         "cumsum": "making prompts", "nonzero": "making prompts", "adam": "optimiser", "copy": "copies",
         "cat": "copies",
         "add": "sums (residuals, adapters, biases)", "mul": "products elementwise", "div": "products elementwise"}


def product_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The machine's best rate of matrix products over some shapes, in operations a second."""
    best, times = 0.0, AT_A_TIME if device.type == "cuda" else 1
    shapes = SHAPES + GPU_SHAPES if device.type == "cuda" else SHAPES
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        taken = fastest(lambda a=a, b=b: [a @ b for _ in range(times)], device, seconds / len(shapes))
        best = max(best, times * 2 * m * k * n / taken)
    return best


def fastest(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of as many calls as fit, at least one, after one to warm up."""
    best, end = float("inf"), time.monotonic() + seconds
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    while best == float("inf") or time.monotonic() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def operations(model: Llmgr, tokens: int, targets: int) -> float:
    """Operations that a tuning step needs for its useful tokens and its targets, forward and backward.

    A frozen matrix takes 2 a weight and token forward and 2 for the gradient of its input; an adapter 2 more for its
    own. A target takes 4 an item and width of the query, 6 where the item table is trained. Attention over the few
    tokens of a session, the graph encoder and everything elementwise count for nothing.
    """
    embedding = model.language_model.get_input_embeddings().weight
    matrices = [(p.numel(), "lora_" in name) for name, p in model.language_model.named_parameters()
                if p.dim() == 2 and p is not embedding and "embeddings" not in name]
    table = getattr(model.output, "table", None)
    items = 4 * table.numel() if table is not None else 6 * sum(p.numel() for p in model.output.parameters())
    return tokens * sum(n * (6 if own else 4) for n, own in matrices) + float(targets) * items


def steps(job: BehaviourJob, batches: list[Tensor], optimizer: torch.optim.Optimizer, warm: int) -> dict[str, float]:
    """Seconds, useful tokens, targets and prompts of one optimiser step a batch, the first `warm` left out.

    A batch's seconds are those of its fastest step of several, as a product's are: what else runs only adds to them.
    """
    figures: Counter[str] = Counter()
    device = job.device
    for number, batch in enumerate(batches):
        least = float("inf")
        for _ in range(1 if number < warm else TIMES):
            start = time.perf_counter()
            loss = job.loss(batch)
            (loss.total / loss.targets).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            least = min(least, time.perf_counter() - start)
        if number >= warm:
            figures.update(seconds=least, tokens=loss.tokens, targets=loss.targets, prompts=len(batch))
    return dict(figures)


def shares(job: BehaviourJob, batches: list[Tensor]) -> list[tuple[str, float]]:
    """What a step's time goes to: matrix products first, then the rest, largest first, as shares.

    On a GPU its kernels' time counts, and what is left of the clock's is its waiting for the CPU: at most, since
    watching slows the CPU down.
    """
    gpu = job.device.type == "cuda"
    watching = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=watching, acc_events=True) as watched:
        start = time.perf_counter()
        for batch in batches:
            loss = job.loss(batch)
            (loss.total / loss.targets).backward()
            job.model.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        taken = 1e6 * (time.perf_counter() - start)
    spent: Counter[str] = Counter()
    for event in watched.key_averages():
        if event.device_type == (DeviceType.CUDA if gpu else DeviceType.CPU):
            spent[kind_of(event.key)] += event.self_device_time_total if gpu else event.self_cpu_time_total
    if gpu:
        spent["waiting for the CPU, at most"] = max(0.0, taken - sum(spent.values()))
    total = sum(spent.values())
    first = spent.pop("matrix products", 0)
    return [("matrix products", first / total), *((kind, t / total) for kind, t in spent.most_common())]


def kind_of(name: str) -> str:
    """The kind of work that a torch operator does, or a GPU's kernel, which a replayed graph has without operators."""
    name = name.lower()
    if kernel := next((kind for word, kind in KERNELS.items() if word in name and "aten::" not in name), None):
        return kernel
    name = name.removeprefix("aten::").removeprefix("_")
    if name in PRODUCTS or name.startswith("linear_cross_entropy"):
        return "matrix products"
    return next((kind for word, kind in WORDS.items() if word in name), "the rest")


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a step that is timed."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
