"""Dropout fused with bias, activation and residual."""
