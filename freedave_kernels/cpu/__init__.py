"""Ops on CPU tensors that torch's own kernels compose: one file each, same name. The others are C++ (csrc/cpu)."""
