"""Build script: the packages and the pybind11 extension (no torch at build time).

The extension is optional: where there is no compiler, or with ``DAG_HESSE_PURE=1`` (which makes a wheel for every
platform), the package is installed without it, works more slowly, and says so in its reports.
"""

import os
import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

# Loops of elementwise programs become vector code; sums of products may round once.
flags = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
extension = Pybind11Extension(
    "dag_hesse._core",
    ["csrc/reachability.cpp", "csrc/program.cpp", "csrc/transpose.cpp"],
    depends=["csrc/bindings.hpp", "csrc/processor.hpp"],
    cxx_std=17,
    extra_compile_args=flags,
    optional=True,
)

setup(
    packages=find_packages(include=["dag_hesse", "dag_hesse.*"]),
    ext_modules=[] if os.environ.get("DAG_HESSE_PURE") == "1" else [extension],
    cmdclass={"build_ext": build_ext},
)
