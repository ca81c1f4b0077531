"""The ground truth (design §2.1): dense double-backward through zero-valued additive leaves, nothing of ours in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Blocks = dict[tuple[str, str], Tensor]
_SEEDS = count()


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """As a table: the second derivatives of PyTorch's kernel cancel (1e-5 off where gradients differ in size)."""
    count = x.shape[dim]
    seen = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
    table = x.movedim(dim, -1).unsqueeze(-2).expand(*x.movedim(dim, -1).shape, count)
    return table.masked_fill(~seen, -torch.inf).logsumexp(-1).movedim(-1, dim)


def _i1(x: Tensor) -> Tensor:
    """By its integral, whose trapezoid rule is exact to rounding for small x, where PyTorch's derivatives cancel."""
    cosines = torch.cos((torch.arange(64, dtype=x.dtype, device=x.device) + 0.5) * (math.pi / 64))
    return (torch.exp(x.unsqueeze(-1) * cosines) * cosines).mean(-1)


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Forms that autograd differentiates twice, and right: fused attention and vendors' recurrent layers it cannot."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
            mock.patch.object(torch, "logcumsumexp", _logcumsumexp),
            mock.patch.object(torch.special, "i1", _i1),
        ):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _first_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the first floating-point tensor of a module's output."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    if isinstance(output, dict):
        key = next(iter(output))
        output[key] = change(output[key])
        return output
    raise TypeError(type(output))


class Leaves:
    """Zero leaves added to module outputs by hooks; ``name[k]`` is the k-th call, a bare name all calls together."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, list(names)
        self.made: dict[str, list[Tensor]] = {name: [] for name in names}
        self.values: dict[str, Tensor] = {}

    def __enter__(self) -> Leaves:
        self.handles = []
        for name in {n.split("[")[0] for n in self.names}:
            self.handles.append(self.model.get_submodule(name).register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, base: str) -> Any:
        calls = -1

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1

            def change(x: Tensor) -> Tensor:
                for name in self.names:
                    if name in (base, f"{base}[{calls}]"):
                        leaf = torch.zeros_like(x, requires_grad=True)
                        self.made[name].append(leaf)
                        x = self.values[name] = x + leaf
                return x

            return _first_tensor(output, change)

        return hook


def _jacobians(rows_of: Tensor, groups: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Per group: rows are elements of ``rows_of``; columns those of the group, summed over its tensors (calls)."""
    flat = [x for group in groups.values() for x in group]
    rows: dict[str, list[Tensor]] = {name: [] for name in groups}
    for y in rows_of.reshape(-1):
        found: Sequence[Tensor | None] = [None] * len(flat)
        if y.requires_grad:
            found = torch.autograd.grad(y, flat, retain_graph=True, allow_unused=True)
        row = iter([torch.zeros_like(x) if g is None else g for g, x in zip(found, flat, strict=True)])
        for name, group in groups.items():
            rows[name].append(torch.stack([next(row).reshape(-1) for _ in group]).sum(0))
    return {name: torch.stack(found) for name, found in rows.items()}


class Truth:
    """Joint blocks (batch axes included) of a model's loss: ``full[v, w]`` and ``gn[v, w]``.

    Args:
        model, run: ``run()`` calls the model and returns the scalar loss.
        names, parameters: modules (or calls of them) and parameters: the points.
        out: the module whose output the loss consumes ("" is the model itself).
        axes: batch axis of a point, where it is not 0.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[[], Tensor],
        names: Sequence[str],
        parameters: Sequence[str] = (),
        out: str = "",
        axes: Mapping[str, int] | None = None,
    ) -> None:
        wanted = list(dict.fromkeys([*names, out]))
        own = dict(model.named_parameters())
        frozen = [p for p in own.values() if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        with Leaves(model, wanted) as leaves, differentiable_twice():
            loss = run()
        groups = {**{name: leaves.made[name] for name in wanted}, **{name: [own[name]] for name in parameters}}
        points = [*names, *parameters]
        flat = list({id(leaf): leaf for group in groups.values() for leaf in group}.values())
        grads = torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True)
        of_leaf = {id(x): torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads, strict=True)}
        total = {v: torch.stack([of_leaf[id(x)].reshape(-1) for x in group]).sum(0) for v, group in groups.items()}
        pointed = {v: groups[v] for v in points}
        self.full = {(v, w): h for v in points for w, h in _jacobians(total[v], pointed).items()}
        hessian = _jacobians(total[out], {out: groups[out]})[out]
        slope = _jacobians(leaves.values[out], pointed)
        self.gn = {(v, w): slope[v].T @ hessian @ slope[w] for v in points for w in points}
        for p in frozen:
            p.requires_grad_(False)
        self.shapes = {v: tuple(groups[v][0].shape) for v in points}
        self.axes = {v: (axes or {}).get(v, 0) for v in names}

    def _split(self, x: Tensor, v: str) -> Tensor:
        """(rows, columns) -> (batch, d_v, columns); a parameter has no batch."""
        if v not in self.axes:
            return x.unsqueeze(0)
        return (
            x.reshape(*self.shapes[v], -1)
            .movedim(self.axes[v], 0)
            .reshape(self.shapes[v][self.axes[v]], -1, x.shape[1])
        )

    def block(self, v: str, w: str, part: str, batch_mode: str, samples: int = 0) -> Tensor:
        """The block in a batch mode; ``samples``: batch size of a mean loss (``per_sample`` undoes its 1/B)."""
        h = {"full": self.full, "gn": self.gn}[part][v, w] if part != "tensor" else self.full[v, w] - self.gn[v, w]
        rows = self._split(h, v)
        both = torch.stack([self._split(row.T, w) for row in rows])  # (b_v, b_w, d_w, d_v)
        if batch_mode == "joint":
            return both.permute(0, 3, 1, 2).reshape(h.shape)  # sample by sample
        if batch_mode == "shared":
            return both.sum((0, 1)).T
        return torch.stack([both[b, b].T for b in range(len(rows))]) * samples


def error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Relative Frobenius error; ``scale`` is a floor of the denominator (a zero block has no scale of its own)."""
    floor = max(float(expected.norm()), scale)
    difference = float((found.double() - expected.double()).norm())
    return difference / floor if floor else difference


class Rounded(TorchDispatchMode):
    """Monte Carlo arithmetic (Parker, 1997): every floating-point result is off by a random error of one rounding.

    How far a computation moves under it is how far rounding moves it, cancellation included: that between ops, and that
    inside of a softmax's backward, g − pΣg, whose result is off by a rounding of g.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(next(_SEEDS))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in given:
                x.mul_(1 + self._rounding(x))
                if "softmax_backward" in func.name():
                    x.add_(self._rounding(x) * args[0])
        return found

    def _rounding(self, like: Tensor) -> Tensor:
        noise = torch.rand(like.shape, generator=self.generator, dtype=torch.float64).to(like) * 2 - 1
        return torch.finfo(like.dtype).eps * noise
