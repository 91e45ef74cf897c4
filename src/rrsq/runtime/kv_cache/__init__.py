"""The KV cache in 4 bits, as caches of transformers."""
