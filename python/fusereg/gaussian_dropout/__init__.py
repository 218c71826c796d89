"""Multiplicative Gaussian noise."""
