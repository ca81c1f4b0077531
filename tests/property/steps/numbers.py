"""Steps through complex numbers, linear algebra and whole layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.property.steps.parts import WIDTH


def four(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1] * 0.5], 1)


def fft(m: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    return torch.fft.irfft(spectrum * torch.tensor([1.0, 0.5 + 0.2j]).to(spectrum), n=WIDTH)


def power_spectrum(m: Any, x: Tensor) -> Tensor:
    spectrum = torch.fft.fft(x)
    return (spectrum * spectrum.conj()).real * 0.2 + spectrum.imag * 0.5


def rotated(m: Any, x: Tensor) -> Tensor:
    z = torch.view_as_complex(four(x).reshape(len(x), 2, 2))
    turned = z * torch.polar(torch.ones(2), torch.arange(2.0)).to(z)
    return torch.view_as_real(turned).flatten(1)[:, :WIDTH]


def modulus(m: Any, x: Tensor) -> Tensor:
    return (torch.complex(x, x.flip(1)) + (1.5 + 0.5j)).abs() * 0.5


def complex_written(m: Any, x: Tensor) -> Tensor:
    z = torch.complex(x, x.sin())
    torch.view_as_real(z)[..., 0].mul_(0.5)
    z[:, 0] *= 1j
    return z.real + torch.view_as_real(z.exp())[..., 1].clamp(-2, 2)


def wirtinger(m: Any, x: Tensor) -> Tensor:
    z = (x + 1j * x.roll(1, 1)) @ torch.complex(m.inner.weight, m.masked.weight)
    return (z / (2.0 + (z * z.conj()).real)).real


def solve(m: Any, x: Tensor) -> Tensor:
    return torch.linalg.solve(x.mT @ x + torch.eye(WIDTH).to(x), x.mT).mT


def inverse(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.inv(m.inner.weight @ m.inner.weight.mT + torch.eye(WIDTH).to(x))


def matrix_exp(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.matrix_exp(0.3 * m.inner.weight)


def cholesky(m: Any, x: Tensor) -> Tensor:
    return x @ torch.linalg.cholesky(m.inner.weight @ m.inner.weight.mT + torch.eye(WIDTH).to(x))


def cell(m: Any, x: Tensor) -> Tensor:
    return m.cell(x, x.sin()) + m.cell(x)


def multihead(m: Any, x: Tensor) -> Tensor:
    z = torch.stack([x, x.sin()], 1)
    return m.attention(z, z, z, need_weights=False)[0].mean(1)


def flash(m: Any, x: Tensor) -> Tensor:
    z = torch.stack([x, x.sin(), x * 0.5], 1)
    return F.scaled_dot_product_attention(z, z.cos(), z, is_causal=True)[:, 2]
