"""Tensors lie where the tests run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import device


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """Tensors that a forward makes lie where the tests run."""
    with torch.device(device.NAME):
        yield
