"""Dropout, residual sum and layer or RMS normalization in one pass."""
