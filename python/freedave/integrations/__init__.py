"""Doors into other libraries: SGLang, transformers' `generate`, lm-evaluation-harness, published decoding functions.

Each module imports the library it is for; the package itself imports none.
"""
