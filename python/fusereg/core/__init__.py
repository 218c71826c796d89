"""What all rooms build on: the tie to torch, checks, memory, random numbers, operators."""
