"""Cross-entropy with label smoothing, for indices, probabilities and mixed labels."""
