"""Derivatives of modified Bessel functions against SciPy's, near zero too, where the usual formulas cancel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import iv, ivp
from torch import Tensor

from dag_hesse.rules import RULES
from tests.oracle import error
from tests.rules.samples import Sample
from tests.rules.test_rules import make_call

X = torch.tensor([1e-9, 1e-4, 1e-2, 0.3, 0.99, 1.01, 2.5, 20.0, -1e-4, -0.5, -3.0], dtype=torch.float64)


def scaled(x: np.ndarray, order: int) -> np.ndarray:
    """The derivative of that order of e^-|x| I₁(x)."""
    f, s = [ivp(1, x, k) if k else iv(1, x) for k in range(3)], -np.sign(x)
    return np.exp(-np.abs(x)) * (s * f[0] + f[1] if order == 1 else f[0] + 2 * s * f[1] + f[2])


@pytest.mark.parametrize("name, exact", [("i1", lambda x, k: ivp(1, x, k)), ("i1e", scaled)])
def test_derivatives_of_the_first_bessel_function(name: str, exact: object) -> None:
    call = make_call(f"aten.special_{name}.default", Sample(lambda: (X.clone(),)))
    partials = RULES[call.node.op].partials
    assert partials is not None and callable(exact)
    first, second = partials(call)
    for order, found in ((1, first[0]), (2, second[0, 0])):
        assert isinstance(found, Tensor)
        expected = torch.from_numpy(exact(X.numpy(), order))
        assert all(error(a, b) < 1e-10 for a, b in zip(found.cpu(), expected, strict=True))
