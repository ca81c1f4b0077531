"""Everybody else's Hessian products, made one at a time. ``make peers`` installs what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench import in_jax
from bench.workloads import Workload

Named = dict[str, Tensor]  # by parameter
Product = Callable[[], Named]
Maker = Callable[[Workload, Named], Product]  # of a workload's product with one vector; attention is decomposed


def _own(work: Workload) -> dict[str, Tensor]:
    return dict(work.model.named_parameters())


def _detached(work: Workload) -> Named:
    return {name: p.detach() for name, p in work.model.named_parameters()}


def forward_over_reverse(work: Workload) -> Callable[[Named, Named], Named]:
    """functorch's (parameters, vector) -> product."""
    gradient = torch.func.grad(work.functional)
    return lambda params, v: torch.func.jvp(gradient, (params,), (v,))[1]


def _functorch(work: Workload, v: Named) -> Product:
    product, params = forward_over_reverse(work), _detached(work)
    return lambda: product(params, v)


def _compiled(work: Workload, v: Named) -> Product:
    product, params = torch.compile(forward_over_reverse(work), dynamic=False), _detached(work)
    return lambda: product(params, v)


def _reverse_over_reverse(work: Workload, v: Named) -> Product:
    gradient, params = torch.func.grad(work.functional), _detached(work)
    return lambda: torch.func.vjp(gradient, params)[1](v)[0]


def _linearized(work: Workload, v: Named) -> Product:
    push = torch.func.linearize(torch.func.grad(work.functional), _detached(work))[1]
    return lambda: push(v)


def _gauss_newton(work: Workload, v: Named) -> Product:
    params = _detached(work)

    def forward(params: Named) -> Tensor:
        return torch.func.functional_call(work.model, params, (work.x,))

    def product() -> Named:
        pushed = torch.func.jvp(forward, (params,), (v,))[1]
        out, pull = torch.func.vjp(forward, params)[:2]
        ybar = torch.func.jvp(torch.func.grad(work.loss), (out,), (pushed,))[1]
        return pull(ybar)[0]

    return product


def _gradient(work: Workload) -> tuple[Tensor, ...]:
    return torch.autograd.grad(work.value(), list(_own(work).values()), create_graph=True)


def _again(work: Workload, v: Named, gradient: tuple[Tensor, ...], **options: Any) -> Named:
    own = _own(work)
    found = torch.autograd.grad(gradient, list(own.values()), [v[name] for name in own], **options)
    return dict(zip(own, found, strict=True))


def _double_backward(work: Workload, v: Named) -> Product:
    return lambda: _again(work, v, _gradient(work))


def _retained(work: Workload, v: Named) -> Product:
    gradient = _gradient(work)
    return lambda: _again(work, v, gradient, retain_graph=True)


def _curvlinops(operator: str) -> Maker:
    def make(work: Workload, v: Named) -> Product:
        import curvlinops

        own = _own(work)
        made = getattr(curvlinops, operator)(
            work.model, nn.CrossEntropyLoss(), list(own.values()), [(work.x, work.y)], check_deterministic=False
        )
        vectors = [v[key] for key in own]
        return lambda: dict(zip(own, made @ vectors, strict=True))

    return make


def _eigenthings(work: Workload, v: Named) -> Product:
    import hessian_eigenthings

    own = _own(work)
    loss = hessian_eigenthings.supervised_loss(nn.CrossEntropyLoss())
    made = hessian_eigenthings.HessianOperator(work.model, [(work.x, work.y)], loss)
    flat = torch.cat([v[key].flatten() for key in own])

    def product() -> Named:
        pieces = made.matvec(flat).split([p.numel() for p in own.values()])
        return {name: x.reshape(own[name].shape) for name, x in zip(own, pieces, strict=True)}

    return product


# H·v, fresh unless its name says otherwise.
HESSIANS: Mapping[str, Maker] = {
    "functorch jvp∘grad": _functorch,
    "functorch jvp∘grad, torch.compile": _compiled,
    "functorch vjp∘grad": _reverse_over_reverse,
    "functorch linearize, amortized": _linearized,
    "double-backward": _double_backward,
    "double-backward, retained graph": _retained,
    "curvlinops": _curvlinops("HessianLinearOperator"),
    "hessian-eigenthings": _eigenthings,
    "JAX jvp∘grad, jit": in_jax.product,
    "JAX linearize, jit, amortized": in_jax.linearized,
}
# GN·v.
GAUSS_NEWTONS: Mapping[str, Maker] = {
    "functorch GGN": _gauss_newton,
    "curvlinops GGN": _curvlinops("GGNLinearOperator"),
}
