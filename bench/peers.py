"""Everybody else's Hessian products. ``make peers`` installs what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import in_jax
from bench.workloads import Workload

Products = dict[str, Callable[[], dict[str, Tensor]]]


def hessians(work: Workload, v: dict[str, Tensor]) -> Products:
    """Everybody's H·v, fresh unless it says otherwise; attention is decomposed, as double derivatives need it."""
    params = {name: p.detach() for name, p in work.model.named_parameters()}
    own = dict(work.model.named_parameters())
    names, vectors = list(own), [v[name] for name in own]
    gradient = torch.func.grad(work.functional)

    def named(values: Any) -> dict[str, Tensor]:
        return dict(zip(names, values, strict=True))

    def double_backward() -> dict[str, Tensor]:
        first = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
        return named(torch.autograd.grad(first, list(own.values()), vectors))

    def forward_over_reverse(params: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.jvp(gradient, (params,), (v,))[1]

    kept = torch.autograd.grad(work.value(), list(own.values()), create_graph=True)
    _, push = torch.func.linearize(gradient, params)
    compiled = torch.compile(forward_over_reverse, dynamic=False)
    return {
        "functorch jvp∘grad": lambda: forward_over_reverse(params, v),
        "functorch jvp∘grad, torch.compile": lambda: compiled(params, v),
        "functorch vjp∘grad": lambda: torch.func.vjp(gradient, params)[1](v)[0],
        "functorch linearize, amortized": lambda: push(v),
        "double-backward": double_backward,
        "double-backward, retained graph": lambda: named(
            torch.autograd.grad(kept, list(own.values()), vectors, retain_graph=True)
        ),
        **_curvlinops("HessianLinearOperator", "curvlinops", work, v),
        **_eigenthings(work, v),
        **in_jax.products(work, v),
    }


def gauss_newtons(work: Workload, v: dict[str, Tensor]) -> Products:
    """Everybody's GN·v."""
    params = {name: p.detach() for name, p in work.model.named_parameters()}

    def functorch() -> dict[str, Tensor]:
        def forward(params: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(work.model, params, (work.x,))

        pushed = torch.func.jvp(forward, (params,), (v,))[1]
        out, pull = torch.func.vjp(forward, params)[:2]
        ybar = torch.func.jvp(torch.func.grad(work.loss), (out,), (pushed,))[1]
        return pull(ybar)[0]

    return {"functorch GGN": functorch, **_curvlinops("GGNLinearOperator", "curvlinops GGN", work, v)}


def _curvlinops(operator: str, name: str, work: Workload, v: dict[str, Tensor]) -> Products:
    import curvlinops

    own = dict(work.model.named_parameters())
    made = getattr(curvlinops, operator)(
        work.model, nn.CrossEntropyLoss(), list(own.values()), [(work.x, work.y)], check_deterministic=False
    )
    vectors = [v[key] for key in own]
    return {name: lambda: dict(zip(own, made @ vectors, strict=True))}


def _eigenthings(work: Workload, v: dict[str, Tensor]) -> Products:
    import hessian_eigenthings

    own = dict(work.model.named_parameters())
    loss = hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss())
    made = hessian_eigenthings.HessianOperator(work.model, [(work.x, work.y)], loss)
    flat = torch.cat([v[key].flatten() for key in own])

    def product() -> dict[str, Tensor]:
        pieces = made.matvec(flat).split([p.numel() for p in own.values()])
        return {name: x.reshape(own[name].shape) for name, x in zip(own, pieces, strict=True)}

    return {"hessian-eigenthings": product}
