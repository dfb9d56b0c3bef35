"""The ops: one file each with its signature, its contract in the docstring, its argument checks and its fake kernel."""
