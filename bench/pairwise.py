"""The baseline of ``bench analyze``: the paper's protocol (Appendix N.8), pair by pair with double-backward.

Per pair (v, w): 30 Rademacher probes for ‖H[v,w]‖_F, 20 power iterations for ‖H[v,w]‖₂, and 30 probes with the analytic
J⊤L″J product for the GN-gap. Perturbations are additive leaves shared by the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """Estimates of one pair; ``samples`` are the probes' ‖H z‖²."""

    resonance: float
    stderr: float
    spectral: float
    gap: float


def with_leaves(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model with one zero leaf per point, of the size of one sample, added to its (first) output."""
    leaves: dict[str, Tensor] = {}
    handles = []

    def hook(name: str) -> Callable[..., Any]:
        def add(module: nn.Module, args: object, output: Any) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            leaves[name] = torch.zeros_like(value[:1], requires_grad=True)
            value = value + leaves[name]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return add

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
    try:
        return leaves, model(x)
    finally:
        for handle in handles:
            handle.remove()


def gauss_newton(
    output: Tensor,
    loss: Callable[[Tensor], Tensor],
    sources: Sequence[Tensor],
    z: Sequence[Tensor],
    reads: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Jᵀ L″ J z at the leaves ``reads``, the forward product by the double-backward trick."""
    dummy = torch.zeros_like(output, requires_grad=True)
    back = torch.autograd.grad(output, sources, dummy, create_graph=True)
    pushed = torch.autograd.grad(back, dummy, z, retain_graph=True)[0]
    out = output.detach().requires_grad_()
    slope = torch.autograd.grad(loss(out), out, create_graph=True)[0]
    ybar = torch.autograd.grad(slope, out, pushed)[0]
    return torch.autograd.grad(output, reads, ybar, retain_graph=True)


class PairwiseBaseline:
    """Double-backward products of one pair, on a retained graph."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], v: str, w: str
    ) -> None:
        names = list(dict.fromkeys([v, w]))
        self.leaves, self.output = with_leaves(model, names, x)
        self.v, self.w = self.leaves[v], self.leaves[w]
        self.value = loss(self.output, y)
        both = torch.autograd.grad(self.value, [self.v, self.w], create_graph=True)
        self.gradient = {v: both[0], w: both[1]}
        self.of = {id(self.v): both[0], id(self.w): both[1]}
        self.loss, self.y = loss, y

    def product(self, z: Tensor, at: Tensor, by: Tensor) -> Tensor:
        """H[at, by] z."""
        return torch.autograd.grad(self.of[id(by)], at, z, retain_graph=True)[0]

    def gn_product(self, z: Tensor) -> Tensor:
        """J_vᵀ L″ J_w z."""
        return gauss_newton(self.output, lambda out: self.loss(out, self.y), [self.w], [z], [self.v])[0]


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    v: str,
    w: str,
    *,
    probes: int = 30,
    power: int = 20,
    gap_probes: int = 30,
    generator: torch.Generator | None = None,
) -> Pair:
    """R, ‖·‖₂ and the GN-gap of one pair by the paper's protocol."""
    pair = PairwiseBaseline(model, x, y, loss, v, w)

    def signs() -> Tensor:
        return torch.randint(0, 2, pair.w.shape, generator=generator).to(pair.w.dtype) * 2 - 1

    samples = torch.stack([pair.product(signs(), pair.v, pair.w).pow(2).sum() for _ in range(probes)])
    resonance = float(samples.mean().sqrt())
    stderr = float(samples.std() / probes**0.5 / (2 * max(resonance, 1e-30)))
    u = torch.randn(pair.w.shape, generator=generator, dtype=pair.w.dtype)
    norm = torch.zeros(())
    for _ in range(power):
        u = u / u.norm().clamp_min(1e-30)
        u = pair.product(pair.product(u, pair.v, pair.w), pair.w, pair.v)
        norm = u.norm()
    above, below = 0.0, 0.0
    for _ in range(gap_probes):
        z = signs()
        full, gn = pair.product(z, pair.v, pair.w), pair.gn_product(z)
        above += float((full - gn).pow(2).sum())
        below += float(gn.pow(2).sum())
    return Pair(resonance, stderr, float(norm.sqrt()), (above / max(below, 1e-30)) ** 0.5)
