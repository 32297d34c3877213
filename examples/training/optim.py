"""The optimisers, and what makes a training step fast on a CPU.

B batch, H heads (of queries), G heads of keys, L queries, S keys, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Plan:
    """What decides a stage's every number; steps may be raised when it goes on."""

    steps: int
    batch: int
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup: int = 100
    cooldown: int = 0  # the last steps, in which the learning rate falls to 0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        rising = min(1.0, (step + 1) / self.warmup)
        return rising * min(1.0, (self.steps - step) / max(1, self.cooldown))


class Optimiser:
    """Muon for the matrices and convolutions inside networks, AdamW for everything else.

    named are parameters with their names; those that ask for no gradient stay as they are.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        named = [(name, weight) for name, weight in named if weight.requires_grad]
        inner = re.compile(r"(^|\.)(blocks|layers|encoder|decoder)\.(?!conv_)")
        matrices = [(n, p) for n, p in named if inner.search(n) and p.ndim in (2, 4)]
        matrices = [(n, p) for n, p in matrices if p.shape[1] > 1]  # not one channel alone
        chosen = {id(p) for _, p in matrices}
        rest = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0, foreach=True)

    def step(self, plan: Plan, step: int) -> None:
        """One step at the plan's rates; forgets the gradients."""
        rate = plan.rate(step)
        self.muon.step(plan.muon_lr * rate)
        for group in self.adam.param_groups:
            group["lr"] = plan.adam_lr * rate
        self.adam.step()
        self.adam.zero_grad()
        self.muon.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for shape, momentum in state["muon"].items():
            self.muon.momentum[shape].copy_(momentum)
        self.adam.load_state_dict(state["adam"])


class Muon:
    """Momentum, made orthogonal before it is applied: every direction of a matrix moves alike.

    Matrices that are several in one (qkv, the chunks of a modulation) are treated one by one, and a
    convolution as the matrix of all that enters an output channel. Matrices of one shape are
    stacked, so that the Newton-Schulz iteration is a few large products.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float = 0.01) -> None:
        self.decay = decay
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, int]]] = {}
        for name, weight in named:
            rows, columns = weight.flatten(1).shape
            several = name.endswith(("qkv.weight", "modulation.weight")) and rows % columns == 0
            parts = rows // columns if several else 1
            self.groups.setdefault((rows // parts, columns), []).append((weight, parts))
        self.momentum = {
            shape: group[0][0].new_zeros(sum(parts for _, parts in group), *shape)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float, beta: float = 0.95) -> None:
        for (rows, columns), group in self.groups.items():
            momentum = self.momentum[rows, columns]  # (matrices, rows, columns)
            grads = torch.cat([weight.grad.reshape(-1, rows, columns) for weight, _ in group])
            momentum.lerp_(grads, 1 - beta)
            update = orthogonal(grads.lerp_(momentum, beta))  # Nesterov's look ahead
            pieces = update.float().split([parts for _, parts in group])
            weights = [weight.data for weight, _ in group]
            pieces = [piece.reshape(w.shape) for piece, w in zip(pieces, weights, strict=True)]
            torch._foreach_mul_(weights, 1 - lr * self.decay)
            torch._foreach_add_(weights, pieces, alpha=-lr * max(1, rows / columns) ** 0.5)

    def zero_grad(self) -> None:
        for group in self.groups.values():
            for weight, _ in group:
                weight.grad = None


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices (n, rows, columns), roughly: singular values 0.7 to 1.2.

    Newton-Schulz iteration with Jordan's coefficients, in bfloat16 where that is fast.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(fast_dtype(matrices.device)).contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        a = torch.bmm(x, x.mT)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


class Recorded:
    """On a GPU, a function of tensors that leaves gradients and returns a number: recorded as a
    CUDA graph, once for each shape of its arguments, so that a call starts one graph instead of a
    thousand small kernels."""

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.function = function
        self.parameters = [p for p in parameters if p.requires_grad]
        self.graphs: dict[Any, tuple[Any, dict[str, Tensor], Tensor, list[Tensor]]] = {}

    def __call__(self, **inputs: Tensor) -> Tensor:
        shapes = tuple(x.shape for x in inputs.values())
        if shapes not in self.graphs:
            self.graphs[shapes] = self._record(inputs)
        graph, read, result, gradients = self.graphs[shapes]
        for name, x in inputs.items():
            read[name].copy_(x)
        graph.replay()
        for weight, gradient in zip(self.parameters, gradients, strict=True):
            weight.grad = gradient
        return result.clone()

    def _record(self, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor], Tensor, list]:
        """The graph, the tensors that it reads, what it returns and the gradients it leaves."""
        read = {name: x.clone() for name, x in inputs.items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles and tunes, which can't be recorded
                self.function(**read)
                self._forget()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.function(**read)
        gradients = [weight.grad for weight in self.parameters]
        return graph, read, result, gradients

    def _forget(self) -> None:
        for weight in self.parameters:
            weight.grad = None


def sent(numbers: list, device: torch.device) -> Tensor:
    """Numbers as a tensor on a device; a GPU is not waited for."""
    tensor = torch.tensor(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it, which is three times as fast; else float32.

    A CPU without such instructions takes many times longer for bfloat16 than for float32.
    """
    fast = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device) -> Any:
    """Products in bfloat16 where that is fast."""
    dtype = fast_dtype(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def plain_attention_on(device: torch.device) -> Any:
    """Within it, on a CPU, attention is two matrix products and a softmax instead of torch's fused
    kernel, whose backward pass takes three to five times as long at a few hundred tokens. On other
    devices nothing changes."""
    return PlainAttention() if device.type == "cpu" else nullcontext()


class PlainAttention(TorchFunctionMode):
    """See `plain_attention_on`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = plain_attention
        return func(*args, **(kwargs or {}))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention without dropout: q (B, H, L, D), k and v (B, G, S, D)."""
    B, H, L, D = q.shape
    if enable_gqa:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.to(v.dtype).reshape(B * H, -1, D) for x in (q, k, v))
    factor = D**-0.5 if scale is None else scale
    scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=factor)  # (B * H, L, S)
    if is_causal:
        attn_mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.view(B, H, L, -1)
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attn_mask.to(scores.dtype)
        scores = scores.flatten(0, 1)
    return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v).view(B, H, L, D)
