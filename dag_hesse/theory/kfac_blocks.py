"""K-FAC's and EKFAC's own blocks, by curvlinops (an extra), compared with the exact ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dag_hesse.errors import BatchError, DependencyError, MemoryBudgetError, OptionError, kind_of
from dag_hesse.operators import HessianOperator
from dag_hesse.randomness import preserved
from dag_hesse.theory.text import table

Array = NDArray[np.float64]
_MOST = 4096  # parameters


@dataclass(frozen=True)
class KFACError:
    """Relative Frobenius errors of block-diagonal approximations of the Hessian, by parameter and as a whole.

    Attributes:
        names: the n parameters.
        size: ‖H[v,v]‖_F, (n,).
        blocks: by method, ‖H[v,v] − K_v‖_F/‖H[v,v]‖_F, (n,). ``"ggn"`` is the exact GN block, ``"kfac"`` and
            ``"ekfac"`` are curvlinops'. NaN where the block is zero.
        whole: by method, ‖H − blkdiag(K)‖_F/‖H‖_F; ``"exact"`` keeps the exact diagonal blocks and is the least, √Φ.
    """

    names: tuple[str, ...]
    size: Array
    blocks: Mapping[str, Array]
    whole: Mapping[str, float]

    def __str__(self) -> str:
        methods = list(self.blocks)
        rows: list[list[object]] = [
            [name, float(self.size[k]), *(float(self.blocks[m][k]) for m in methods)]
            for k, name in enumerate(self.names)
        ]
        whole = ", ".join(f"{name} {error:.1%}" for name, error in self.whole.items())
        return f"{table(['block', '‖H‖_F', *methods], rows)}\nwhole matrix off by: {whole}"


def kfac_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> KFACError:
    """Split what K-FAC gets wrong (paper, Corollary 29): blocks that it drops, H_T, and the Kronecker form.

    The factors are those of the exact GGN (``fisher_type="type-2"``), so nothing is sampled.

    Args:
        model: all of its parameters belong to ``nn.Linear`` or ``nn.Conv2d`` layers, 4096 at most.
        batch: ``(inputs, targets)``: cross-entropy for integer targets, else mean squared error.

    Returns:
        :class:`KFACError`.

    Raises:
        DependencyError: curvlinops is not installed.
        OptionError: the model has other layers with parameters.
        BatchError: the batch is no pair of tensors.
        MemoryBudgetError: there are more parameters.

    Examples:
        >>> import torch, dag_hesse as dh
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> found = dh.theory.kfac_error(net, (torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> found.whole["exact"] <= min(found.whole["kfac"], found.whole["ekfac"])
        True
    """
    _check(model, batch)
    kinds = _curvlinops()
    params = [p for p in model.parameters() if p.requires_grad]
    hessian = HessianOperator(model, batch, params=params)
    eye = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    gn, tensor = (part.double() for part in hessian.parts(eye))
    full = gn + tensor
    diagonal = _diagonal(hessian.form.sizes).to(full.device)
    found = {"exact": full * diagonal, "ggn": gn * diagonal, **_approximations(kinds, model, batch, params, eye)}
    size = _norms(full, hessian.form.sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        blocks = {k: _norms(full - x, hessian.form.sizes) / size for k, x in found.items() if k != "exact"}
    whole = {k: float((full - x).norm() / full.norm()) for k, x in found.items()}
    return KFACError(hessian.form.names, size, blocks, whole)


def _check(model: nn.Module, batch: Any) -> None:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
        raise BatchError("kfac_error() takes one batch of two tensors, (inputs, targets).")
    if not isinstance(model, nn.Module):
        raise OptionError(f"model is {kind_of(model)}; expected a torch.nn.Module.")
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not isinstance(module, (nn.Linear, nn.Conv2d)):
            raise OptionError(f"'{name}' is {kind_of(module)} with parameters; K-FAC knows nn.Linear and nn.Conv2d.")
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST:
        raise MemoryBudgetError(
            f"kfac_error() forms the whole matrix, and {count} parameters are more than {_MOST}: take band_errors()."
        )


def _curvlinops() -> dict[str, Any]:
    """K-FAC's and EKFAC's operators with the factors of the exact GGN."""
    try:
        from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator
    except ImportError as error:
        raise DependencyError(
            f"kfac_error() needs curvlinops ({error}): pip install 'dag-hesse[curvlinops]', or take band_errors()."
        ) from error
    kinds = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}
    return {name: partial(kind, fisher_type=FisherType.TYPE2) for name, kind in kinds.items()}


def _approximations(
    kinds: Mapping[str, Any], model: nn.Module, batch: tuple[Tensor, Tensor], params: list[Any], eye: Tensor
) -> dict[str, Tensor]:
    loss = nn.MSELoss() if batch[1].is_floating_point() else nn.CrossEntropyLoss()
    with preserved():
        return {name: (kind(model, loss, params, [batch]) @ eye).double() for name, kind in kinds.items()}


def _diagonal(sizes: tuple[int, ...] | list[int]) -> Tensor:
    """1 in the diagonal blocks, else 0."""
    return torch.block_diag(*(torch.ones(size, size, dtype=torch.float64) for size in sizes))


def _norms(matrix: Tensor, sizes: tuple[int, ...] | list[int]) -> Array:
    """‖·‖_F of the diagonal blocks."""
    rows = [row.split(list(sizes), dim=1)[k] for k, row in enumerate(matrix.split(list(sizes)))]
    return np.array([float(block.norm()) for block in rows])
