"""The kernels, by the name of their folder: this is :mod:`dag_hesse.kernels` and its modules, the same objects."""

import importlib
import pkgutil
import sys

import dag_hesse.kernels

sys.modules[__name__] = dag_hesse.kernels
for _found in pkgutil.walk_packages(dag_hesse.kernels.__path__, "dag_hesse.kernels."):
    sys.modules[_found.name.removeprefix("dag_hesse.")] = importlib.import_module(_found.name)
