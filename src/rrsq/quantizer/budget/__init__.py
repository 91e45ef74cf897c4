"""Bits as a budget: what quantization costs at each input is measured, and spent where it hurts most."""
