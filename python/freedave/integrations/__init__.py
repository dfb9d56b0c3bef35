"""Doors into other libraries: SGLang, vLLM, dInfer, transformers, lm-evaluation-harness, published decoding functions.

Each module imports the library it is for; the package itself imports none.
"""
