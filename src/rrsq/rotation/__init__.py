"""Building Hadamard matrices and folding rotations into weights."""
