"""Fast-dLLM v2: Qwen2 with block-causal attention and logits shifted by one, as the language model had that it grew from."""

from __future__ import annotations

from freedave.models.families.dream import native_config
from freedave.models.families.family import Defaults, Family, same_name

FAST_DLLM = Family(
    name="Fast-dLLM v2",
    model_type="Fast_dLLM_Qwen",
    architectures=("Fast_dLLM_QwenForCausalLM",),
    native_class="Qwen2ForCausalLM",
    native_config=native_config,
    source=same_name,
    defaults=Defaults("block_causal", mask_token_id=151665, eos_token_id=151645, block_length=32, logits_shift=True),
    tokenizer_class="Qwen2Tokenizer",
)
