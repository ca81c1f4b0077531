"""The kernels' two names stand for the same objects."""

from __future__ import annotations

import importlib
import pkgutil

import dag_hesse.kernels
import kernels
import kernels.arena


def test_every_module_is_one_object() -> None:
    assert kernels is dag_hesse.kernels
    assert kernels.arena is dag_hesse.kernels.arena
    for found in pkgutil.walk_packages(dag_hesse.kernels.__path__, "dag_hesse.kernels."):
        assert importlib.import_module(found.name.removeprefix("dag_hesse.")) is importlib.import_module(found.name)
