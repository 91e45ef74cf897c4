"""The reference implementation of every kernel, in plain PyTorch."""
