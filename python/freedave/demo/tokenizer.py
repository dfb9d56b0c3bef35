"""The demo model's tokenizer: one token a character, in the ordinary Hugging Face files."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MASK, EOS = "<mask>", "<eos>"
# <eos> also pads: the decoder fills the rest of the last block with it.
VOCABULARY = (EOS, MASK, *"0123456789+-*=:#[](), sorted")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer whose `decode` gives back exactly the text given to `encode`.

    A character outside the vocabulary is an error, not an unknown token: the model could only answer it with nonsense.
    """
    tokens = dict.fromkeys(VOCABULARY)
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
