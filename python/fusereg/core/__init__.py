"""Common base of all techniques: the tie to torch, checks, memory, random numbers, operators."""
