"""Dropout of elements, channels, samples and sequences."""
