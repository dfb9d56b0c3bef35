"""Doors into other libraries: transformers' `generate` and lm-evaluation-harness.

Each module imports the library it is for; the package itself imports none.
"""
