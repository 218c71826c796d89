"""Batch normalization, its variants, and folding into convolutions."""
