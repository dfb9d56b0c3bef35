"""Timings of the ops against eager PyTorch: `python -m benchmarks ops` and `python -m benchmarks step`."""
