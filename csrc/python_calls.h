#pragma once

#include <Python.h>

namespace freedave {

// Adds the ops to module _C as functions that call the CPU kernels without torch's dispatcher, and `connect`, which
// they wait for.
void add_python_calls(PyObject* module);

}  // namespace freedave
