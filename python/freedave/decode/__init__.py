"""Decoding: `generate`, `Decoder`, what runs its steps, the state of a sequence, options and results.

Nothing here imports transformers, so that an engine can use the state of a sequence without it.
"""
