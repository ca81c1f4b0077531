"""The ground truth (design §2.1): dense double-backward through zero-valued additive leaves, nothing of ours in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


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
                        x = x + leaf
                return x

            return _first_tensor(output, change)

        return hook


def _jacobian(grads: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """Rows: elements of the summed-over-calls gradient; columns: the same of ``of``."""
    total = torch.stack([g.reshape(-1) for g in grads]).sum(0)
    rows = []
    for k in range(total.numel()):
        if not total.requires_grad:
            rows.append(torch.zeros(of[0].numel(), dtype=total.dtype))
            continue
        row = torch.autograd.grad(total[k], of, retain_graph=True, allow_unused=True)
        rows.append(sum((torch.zeros_like(o) if r is None else r).reshape(-1) for r, o in zip(row, of, strict=True)))
    return torch.stack(rows)


def dense(
    model: nn.Module, run: Callable[[], Tensor], names: Sequence[str], parameters: Sequence[str] = ()
) -> dict[tuple[str, str], Tensor]:
    """Joint blocks H[v, w] over whole tensors (batch axis included) for module and parameter names.

    ``run()`` calls the model and returns the scalar loss.
    """
    with Leaves(model, names) as leaves, sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        loss = run()
    own = dict(model.named_parameters())
    groups = {**leaves.made, **{name: [own[name]] for name in parameters}}
    flat = [leaf for group in groups.values() for leaf in group]
    grads = torch.autograd.grad(loss, flat, create_graph=True, allow_unused=True)
    of_leaf = {id(x): torch.zeros_like(x) if g is None else g for x, g in zip(flat, grads, strict=True)}
    return {
        (v, w): _jacobian([of_leaf[id(x)] for x in groups[v]], groups[w]) for v in groups for w in groups
    }


def shared(block: Tensor, shape_v: Sequence[int], shape_w: Sequence[int], axis: int = 0) -> Tensor:
    """SᵀHS of a joint block: sum both sides over the batch axis."""
    h = block.reshape(*shape_v, *shape_w).sum((axis, len(shape_v) + axis))
    rows = 1
    for k, n in enumerate(shape_v):
        rows *= 1 if k == axis else n
    return h.reshape(rows, -1)
