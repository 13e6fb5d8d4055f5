"""Layers with known per-sample gradients, a file for each family; ``registry`` finds every file here."""
