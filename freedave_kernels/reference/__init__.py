"""The ops in plain PyTorch, written to be read: the oracle that every other backend is held to, on any device."""
