"""Every module of the package can be had by its name; shortened names of points."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import dag_hesse
from dag_hesse.errors import OptionError
from dag_hesse.names import shortened

MODULES = [found.name for found in pkgutil.walk_packages(dag_hesse.__path__, "dag_hesse.")]


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_hidden(name: str) -> None:
    module, (parent, _, leaf) = importlib.import_module(name), name.rpartition(".")
    assert getattr(importlib.import_module(parent), leaf) is module


DOTTED = st.lists(
    st.sampled_from(["encoder", "layers", "self_attn", "0", "11", "linear1", "w", "重み"]), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(st.lists(DOTTED.map(".".join), unique=True, max_size=40), st.integers(8, 30))
def test_shortened_names_fit_and_are_as_different_as_the_names(names: list[str], width: int) -> None:
    short = shortened(names, width)
    assert len(set(short)) == len(names) == len(short)
    assert all(cell_len(name) <= width for name in short)
    if all(cell_len(name) <= width for name in names):
        assert short == names


def test_names_are_not_shortened_to_nothing() -> None:
    with pytest.raises(OptionError, match="at least 8"):
        shortened(["a"], 7)
