"""Every module of the package can be had by its name: no function of the same name hides it."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import dag_hesse

MODULES = [found.name for found in pkgutil.walk_packages(dag_hesse.__path__, "dag_hesse.")]


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_hidden(name: str) -> None:
    module, (parent, _, leaf) = importlib.import_module(name), name.rpartition(".")
    assert getattr(importlib.import_module(parent), leaf) is module
