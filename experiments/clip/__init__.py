"""CLIP training steered by a reference model; ``run.py`` is the entry."""
