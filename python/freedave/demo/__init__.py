"""The embedded demo model: a one-million-parameter masked-diffusion language model, its tasks and its training."""
