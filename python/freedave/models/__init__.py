"""Diffusion language models: how a checkpoint is read, and how its forward is called on drafts."""
