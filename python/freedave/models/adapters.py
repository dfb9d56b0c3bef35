"""Models with adapters of peft: the transformers model inside, whose layers hold the adapters, is what decodes.

A `PeftModel` is called as its model is, but is no transformers model, so that neither its attention nor its head could be
found. peft itself is not needed here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

# Kinds that do more than their layers do: they forward twice, or ask which task it is.
_OUTSIDE_OF_LAYERS = ("XLORA", "POLY")


def without_wrapper(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model of a `PeftModel` whose adapters are inside its layers (LoRA and its kin); others as they are.

    Raises:
        ValueError: adapters that add tokens of their own to the prompt.
    """
    configs: Any = getattr(model, "peft_config", None)
    inner: Any = getattr(getattr(model, "base_model", None), "model", None)
    if not isinstance(configs, dict) or isinstance(model, PreTrainedModel):
        return model
    for name, config in configs.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise ValueError(
                f"the adapter {name!r} ({kind}) adds tokens of its own to every prompt, which the decoder knows nothing of; "
                "adapters inside of layers, such as LoRA, are supported"
            )
        if config.is_adaption_prompt or kind in _OUTSIDE_OF_LAYERS:
            return model
    return inner if isinstance(inner, PreTrainedModel) else model
