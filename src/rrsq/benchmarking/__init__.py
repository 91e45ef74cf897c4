"""Timing quantized linears beside what people would use instead."""
