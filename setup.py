"""Build script: packages of the two source trees and the pybind11 extension (no torch at build time)."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

packages = find_packages(include=["dag_hesse", "dag_hesse.*"])
packages += ["dag_hesse." + name for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    packages=packages,
    ext_modules=[Pybind11Extension("dag_hesse._core", ["csrc/core.cpp"], cxx_std=17)],
    cmdclass={"build_ext": build_ext},
)
