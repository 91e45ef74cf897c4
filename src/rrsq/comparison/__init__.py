"""Quantizing one model by several recipes and measuring them all: what ``rrsq compare`` does, resumably."""
