"""The checkpoint format: what is written, how it is checked, and how transformers loads it."""
