"""The modules of a quantized model: linear, online rotation, KV cache."""
