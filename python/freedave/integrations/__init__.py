"""Doors into other libraries: SGLang, transformers' `generate` and lm-evaluation-harness.

Each module imports the library it is for; the package itself imports none.
"""
