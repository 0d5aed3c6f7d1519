"""A small embedding model trained on WordNet with and without a guide."""
