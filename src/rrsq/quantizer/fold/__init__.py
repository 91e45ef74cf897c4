"""Folding rotations into weights."""
