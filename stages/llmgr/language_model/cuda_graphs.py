"""The language model's forward and backward pass on a GPU, replayed: two programs a step in place of thousands of
kernels, which take a CPU longer to start than a GPU to run.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmgr.runtime.console import say
from llmgr.runtime.errors import out_of_memory


class Replayed:
    """`function(states, *others)`, recorded once for every size of its inputs and replayed from then on.

    A recording is a CUDA graph (torch.cuda.CUDAGraph) of the forward pass and one of the backward pass, over inputs of
    its own that every call is copied to. The graphs share their memory, so that a call's backward pass must come
    before the next call. `trained` are the weights that `function` reads and that learn; their gradients are added up
    as those of any other. `states` must require a gradient. Where `function` asks the GPU for something that a CPU
    waits for it cannot be recorded, and is called as it is from then on.
    """

    def __init__(self, function: Callable[..., Tensor], trained: Sequence[nn.Parameter],
                 recorder: Recorder | None = None) -> None:
        self.function, self.trained = function, list(trained)
        self.recorder = recorder or Recorder()
        self.passes: dict[Any, Pass] = {}
        self.refused = False

    def __call__(self, states: Tensor, *others: Tensor) -> Tensor:
        """What `function` returns, until the next call."""
        size = (*(t.shape for t in (states, *others)), states.dtype)
        if size not in self.passes and not self.refused:
            try:
                self.passes[size] = Pass(self, (states, *others))
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self.refused = True
                say("the language model's pass cannot be recorded for replay on this GPU ("
                    f"{' '.join(str(error).split())[:160]}): it is started kernel by kernel")
        if size not in self.passes:
            return self.function(states, *others)
        return Replay.apply(states, self.passes[size], *others)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add a recording's gradients, which its next replay overwrites, to those of the trained weights."""
        pairs = [(p, g) for p, g in zip(self.trained, grads, strict=True) if g is not None]
        if rest := [(p.grad, g) for p, g in pairs if p.grad is not None]:
            torch._foreach_add_(*map(list, zip(*rest)))
        if fresh := [(p, g) for p, g in pairs if p.grad is None]:
            for parameter, _ in fresh:
                parameter.grad = torch.empty_like(parameter)
            torch._foreach_copy_([p.grad for p, _ in fresh], [g for _, g in fresh])


class Pass:
    """One size's recording: its own inputs, what comes out, and the gradients of both."""

    def __init__(self, owner: Replayed, inputs: Sequence[Tensor]) -> None:
        self.owner = owner
        self.live: Tensor | None = None
        self.inputs = [t.detach().clone() for t in inputs]
        self.inputs[0].requires_grad_(True)
        with torch.enable_grad():
            owner.recorder.warm(lambda: self._backward(torch.zeros_like(self._forward())))
            self.live = None
            out, self.forward = owner.recorder.record(self._forward)
            self.out, self.grad = out.detach(), torch.zeros_like(out)
            self.grads, self.backward = owner.recorder.record(lambda: self._backward(self.grad))
        self.live = None  # its memory is the next recording's, too

    def _forward(self) -> Tensor:
        self.live = self.owner.function(*self.inputs)
        return self.live

    def _backward(self, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(self.live, [self.inputs[0], *self.owner.trained], grad, allow_unused=True)


class Replay(torch.autograd.Function):
    """A call of `Replayed`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, recorded: Pass, *others: Tensor) -> Tensor:
        ctx.recorded = recorded
        for own, given in zip(recorded.inputs, (states, *others), strict=True):
            own.detach().copy_(given)
        recorded.forward()
        return recorded.out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recorded = ctx.recorded
        recorded.grad.copy_(grad)
        recorded.backward()
        of_states, *of_weights = recorded.grads
        recorded.owner.add(of_weights)
        return (of_states, None, *[None] * (len(recorded.inputs) - 1))


class Recorder:
    """Records what a function asks of the GPU as a CUDA graph; all graphs of a recorder share their memory."""

    def __init__(self) -> None:
        self.pool: Any = None

    def warm(self, function: Callable[[], Any]) -> None:
        """Call `function` beside the usual stream, so that what it sets up or compiles at first is not recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What `function` returns, in memory that every replay writes anew, and the replay."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        return result, graph.replay
