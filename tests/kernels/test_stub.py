"""The extension's stub says what the extension has: names, and arguments by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import dag_hesse
from dag_hesse import _core

STUB = Path(dag_hesse.__file__).with_name("_core.pyi")


def stated(tree: ast.Module) -> dict[str, list[str]]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [a.arg for a in node.args.args]
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = [a.arg for a in method.args.args]
    return found


def actual() -> dict[str, list[str]]:
    """As pybind11 writes signatures in docstrings."""
    public = {name: value for name, value in vars(_core).items() if not name.startswith("__")}
    classes = {name: value for name, value in public.items() if isinstance(value, type)}
    functions = {name: value for name, value in public.items() if name not in classes}
    for name, value in classes.items():
        own = {key: one for key, one in vars(value).items() if key == "__init__" or not key.startswith("_")}
        functions |= {f"{name}.{key}": one for key, one in own.items()}
    return {name: arguments(value.__doc__.splitlines()[0]) for name, value in functions.items()}


def arguments(signature: str) -> list[str]:
    return re.findall(r"[(,] ?(\w+): ", signature.partition(" -> ")[0])


def test_the_stub_is_that_of_the_extension() -> None:
    assert stated(ast.parse(STUB.read_text())) == actual()
