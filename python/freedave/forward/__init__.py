"""What a forward computes and how: packed tokens, the cache, attention, predictions, compiled layers. No transformers."""
