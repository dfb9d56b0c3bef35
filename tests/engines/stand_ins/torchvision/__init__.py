"""In the place of torchvision, which SGLang's readers of images import; diffusion language models need none of them."""

import sys
import types
from typing import Any
from unittest.mock import MagicMock

__version__ = "0.0"  # which transformers takes for too old to use


class _Part(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


for part in ("io", "ops", "transforms", "transforms.v2", "transforms.v2.functional", "transforms.functional"):
    sys.modules[f"{__name__}.{part}"] = _Part(f"{__name__}.{part}")
