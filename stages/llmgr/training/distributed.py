"""A training step divided among several processes: shared micro-batches, summed gradients, ZeRO."""
from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from llmgr.training.job import Job

T = TypeVar("T")
Optimizer = torch.optim.Optimizer
MOMENTS = ("exp_avg", "exp_avg_sq")
WHOLE = 100_000  # elements up to which ZeRO-3 leaves a weight whole in every process


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def share(rows: Tensor) -> tuple[Tensor, int]:
    """This process's share of the rows, every `size()`-th of them, and 1.

    Where there is none left for it: the first row, and 0, by which the caller multiplies the loss. Every process must
    take part in every step, since the processes run ZeRO-3's forward pass together.
    """
    own = rows[rank()::size()]
    return (own, 1) if len(own) else (rows[:1], 0)


def spread(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """`function(rows)` with the rows divided among the processes; every process gets the whole result.

    `function` must give one row of the result for each row.
    """
    if size() == 1:
        return function(rows)
    own, counts = share(rows)
    part = function(own)
    parts = [part.new_zeros(-(-len(rows) // size()), *part.shape[1:]) for _ in range(size())]
    mine = torch.zeros_like(parts[0])
    mine[:len(own) * counts] = part[:len(own) * counts]
    distributed.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(0, 1)[:len(rows)]


def added(numbers: list[float]) -> list[float]:
    """Each number summed over the processes."""
    if size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(total)
    return total.tolist()


def from_first(thing: T) -> T:
    """The first process's value, in every process."""
    things = [thing]
    if size() > 1:
        distributed.broadcast_object_list(things, 0)
    return things[0]


def gathered(thing: T) -> list[T]:
    """Every process's value, by rank."""
    things = [thing]
    if size() > 1:
        things *= size()
        distributed.all_gather_object(things, thing)
    return things


def partners(job: Job, trained: dict[str, nn.Parameter], optimizer: Optimizer, clip: float, strategy: str
             ) -> Workers:
    """This process's part in training `job.model`, by launch.strategy; a single process is a replica of its own."""
    kind = Replicas if size() == 1 or strategy == "ddp" else Zero
    return kind(job, trained, optimizer, clip, *([int(strategy[-1])] if kind is Zero else []))


class Replicas:
    """The whole model in every process; the gradients are added up once a step."""

    name = "ddp"

    def __init__(self, job: Job, trained: dict[str, nn.Parameter], optimizer: Optimizer, clip: float) -> None:
        self.job, self.trained, self.optimizer, self.clip = job, trained, optimizer, clip

    def loss(self, micro: Tensor, targets: int) -> tuple[float, int]:
        """Forward and backward pass of this process's share of a micro-batch: its summed loss and useful tokens.

        The gradient is that of the mean over the `targets` of the whole step.
        """
        own, counts = share(micro) if size() > 1 else (micro, 1)
        loss = self.job.loss(own)
        (counts * loss.total / targets).backward()
        return loss.total.item() * counts, loss.tokens * counts

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm. Where it is not finite the weights stay as they are."""
        if size() > 1:
            grads = [p.grad for p in self.trained.values() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            distributed.all_reduce(flat)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads])):
                grad.copy_(total.view_as(grad))
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.clip).item()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def validate(self) -> dict[str, float]:
        """The job's validation."""
        return self.job.validate()

    def state(self) -> dict[str, Any]:
        """The trained weights and the optimiser's state, whole."""
        return {"weights": {k: p.detach() for k, p in self.trained.items()}, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from an optimiser's state."""
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Leave the model as an ordinary module with the trained weights."""


class Within(nn.Module):
    """Calls any function inside a module: ZeRO-3 gathers weights only below the module that it wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)


class Zero:
    """DeepSpeed's ZeRO-2 or ZeRO-3 (Rajbhandari et al. 2020) with our optimiser and our arithmetic.

    Trained weights stay float32 and frozen ones as they are; the job's autocast decides the arithmetic. DeepSpeed's own
    bf16 mode would round the trained weights, too. The state has the form of `Replicas.state`, however many processes
    divide it.
    """

    def __init__(self, job: Job, trained: dict[str, nn.Parameter], optimizer: Optimizer, clip: float, stage: int
                 ) -> None:
        deepspeed = _deepspeed(next(job.model.parameters()).device.type)
        self.job, self.trained, self.optimizer = job, trained, optimizer
        self.stage, self.name, self.form = stage, f"zero{stage}", optimizer.state_dict()
        self.order = [p for group in optimizer.param_groups for p in group["params"]]
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": clip, "zero_allow_untested_optimizer": True,
                  "managed_gradient_accumulation": False,  # step() ends a run of micro-batches, however many
                  "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": WHOLE}}
        self.engine, *_ = deepspeed.initialize(model=Within(job.model), optimizer=optimizer, config=config,
                                               dist_init_required=False)

    def loss(self, micro: Tensor, targets: int) -> tuple[float, int]:
        """As in Replicas."""
        own, counts = share(micro)
        loss = self.engine(self.job.loss, own)
        self.engine.backward(counts * size() * loss.total / targets)  # DeepSpeed averages over the processes
        return loss.total.item() * counts, loss.tokens * counts

    def step(self) -> float:
        """As in Replicas."""
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def validate(self) -> dict[str, float]:
        """The job's validation."""
        return self.engine.module(self.job.validate)

    def state(self) -> dict[str, Any]:
        """As in Replicas; every process takes part and gets all of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        step = self.optimizer.state[self._parts()[0]]["step"]
        moments = {n: {"step": step.clone(), **{key: safe_get_full_optimizer_state(p, key) for key in MOMENTS}}
                   for n, p in enumerate(self.order)}
        return {"weights": {k: safe_get_full_fp32_param(p) for k, p in self.trained.items()},
                "optimizer": {**self.form, "state": moments}}

    def load(self, state: dict[str, Any]) -> None:
        """As in Replicas."""
        steps = max(moments["step"] for moments in state["state"].values())
        for part in self._parts():
            self.optimizer.state[part] = {"step": steps.to(part.device, copy=True),
                                          **{key: torch.zeros_like(part) for key in MOMENTS}}
        self._link()
        for n, moments in state["state"].items():
            for key in MOMENTS:
                self._set(self.order[n], moments[key], key)

    def _set(self, parameter: nn.Parameter, whole: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 2:
            safe_set_full_optimizer_state(parameter, whole, key)
            return
        width = -(-whole.numel() // size())  # the last part is padded
        padded = nn.functional.pad(whole.flatten(), (0, width * size() - whole.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank() * width:][:width], key)

    def _link(self) -> None:
        """Let ZeRO-2's weights know their part of the optimiser's state; it links all groups before all have one."""
        if self.stage == 2:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _parts(self) -> list[Tensor]:
        """This process's parts of the trained weights, as the optimiser knows them."""
        inner = self.engine.optimizer
        return inner.single_partition_of_fp32_groups if self.stage == 2 else inner.fp32_partitioned_groups_flat

    def close(self) -> None:
        """As in Replicas; ZeRO-3's weights end on the CPU, for a GPU need not hold all of them."""
        import deepspeed

        whole, divided = [], self.stage == 3
        for parameter in self.job.model.parameters() if divided else self.order:
            with deepspeed.zero.GatheredParameters([parameter], enabled=divided):
                whole.append((parameter, parameter.detach().to("cpu" if divided else parameter.device, copy=True)))
        self.engine.destroy()
        for parameter, value in whole:
            parameter.data = value


Workers = Replicas | Zero
"""What trains a model in this process; see `partners`."""


def _deepspeed(kind: str) -> Any:
    """DeepSpeed, imported only here: that takes seconds, and it builds operators unless all are marked as there."""
    os.environ.setdefault("DS_ACCELERATOR", kind)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
