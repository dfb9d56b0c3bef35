"""In the place of SGLang's compiled kernels: imported everywhere, called nowhere on a CPU without AMX."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    return kernel
