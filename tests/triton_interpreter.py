"""Lets the Triton kernels run in Triton's interpreter, on CPU tensors, fast enough for thousands of small calls."""

from __future__ import annotations

import os

import torch


def use_where_there_is_no_gpu() -> None:
    """Must run before anything imports triton: `triton.jit` decides when a kernel is defined."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def keep_language_patched() -> None:
    """Gives triton.language its interpreted meaning once, for good.

    The interpreter does so again for every function that a kernel calls, which takes longer than the function.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def every_module() -> None: ...

    every_module.__globals__.update(tl=tl, core=tl.core)  # whose builtins the interpreter looks for
    interpreter._patch_lang(every_module)
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
