"""``pytest --device cuda``: models, rules and random graphs on another device, against oracles on that device."""

from __future__ import annotations

import pytest
import torch

from tests import device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models, batches and samples lie: cpu, cuda, cuda:1 …")


def pytest_configure(config: pytest.Config) -> None:
    device.NAME = config.getoption("--device")
    torch.backends.cudnn.allow_tf32 = False  # on by default, and then convolutions have three digits
