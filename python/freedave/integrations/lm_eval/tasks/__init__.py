"""The embedded model's tasks as tasks of lm-evaluation-harness: held-out problems, made on the spot."""
