// What the module is made of: see program.cpp, transpose.cpp.
#pragma once

#include <pybind11/pybind11.h>

void bind_program(pybind11::module_& m);
void bind_transpose(pybind11::module_& m);
