"""Hadamard matrices and the rotations of a model."""
