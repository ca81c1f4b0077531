// Programs: see program.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_program(pybind11::module_& m);
