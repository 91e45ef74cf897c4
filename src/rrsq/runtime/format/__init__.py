"""The checkpoint format: what it says, how it is checked, and how transformers loads it."""
