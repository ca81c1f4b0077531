"""What ranks compare: checksums of tensors see every change, and callables are told apart by what they do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag_hesse.alike import content, described, named


def swapped(x: Tensor) -> Tensor:
    """The first element and the last one in each other's place."""
    x = x.clone()
    x[0], x[-1] = x[-1].clone(), x[0].clone()
    return x


@pytest.mark.parametrize("size", [3, 64, 2**18 * 2 + 5])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128, torch.int64, torch.uint8, torch.bool]
)
def test_a_checksum_sees_every_change_of_values_and_order(dtype: torch.dtype, size: int) -> None:
    x = torch.arange(size).remainder(251).to(dtype)
    x[-1] = 1
    padded = torch.cat([x[:1], x])
    assert content(x) == content(x.clone()) == content(padded[1:])  # at another place in memory
    changed = [swapped(x), x.logical_not() if dtype is torch.bool else x + (torch.arange(size) == size // 2).to(dtype)]
    changed += [x.reshape(1, -1), x.to(torch.complex64)]
    changed += [x.roll(2**18)] if size > 2**18 else []
    if dtype.is_floating_point:  # two bits of the highest place
        changed.append(torch.where(torch.arange(size) >= size - 2, -x, x))
    assert len({content(y) for y in [x, *changed]}) == 1 + len(changed)


def test_a_checksum_is_of_values_not_of_strides() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert content(x.t().contiguous().t()) == content(x) == content(x.clone())
    assert content(torch.zeros(())) == content(torch.zeros(())) and content(torch.zeros(0)) == content(torch.zeros(0))
    z = torch.view_as_complex(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert content(z.conj()) == content(z.conj().resolve_conj()) != content(z)


def _loss(factor: float) -> Callable[[Any, Any], Tensor]:
    return lambda o, t: factor * F.mse_loss(o, t)


def test_callables_are_told_apart_by_what_they_do() -> None:
    first, second = (lambda o, t: (o - t).abs().sum()), (lambda o, t: (o - t).square().sum())
    assert named(first) != named(second) and named(_loss(1.0)) == named(_loss(2.0))  # what is closed over is not seen
    assert named(partial(F.cross_entropy, label_smoothing=0.1)) != named(partial(F.cross_entropy, label_smoothing=0.2))
    assert named(nn.HuberLoss(delta=1.0)) == named(nn.HuberLoss(delta=1.0)) != named(nn.MSELoss())
    assert named(nn.Dropout().eval()) != named(nn.Dropout().train())
    assert named(nn.Linear(2, 2)) != named(nn.Linear(2, 2))  # other weights
    assert "0x" not in described([first, nn.MSELoss(), object(), {"a": (1, None)}])
