"""Build script: the packages and the pybind11 extension (no torch at build time)."""

import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Loops of elementwise programs become vector code; sums of products may round once.
flags = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

setup(
    packages=find_packages(include=["dag_hesse", "dag_hesse.*"]),
    ext_modules=[
        Pybind11Extension(
            "dag_hesse._core",
            ["csrc/reachability.cpp", "csrc/elementwise.cpp"],
            depends=["csrc/elementwise.hpp"],
            cxx_std=17,
            extra_compile_args=flags,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
