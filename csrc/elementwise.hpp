// Elementwise programs: see elementwise.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_elementwise(pybind11::module_& m);
