"""Linear DRRho models on real tables."""
