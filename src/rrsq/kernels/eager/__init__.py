"""The reference implementation of every kernel, in plain PyTorch: correct everywhere, fast on CPUs with int8 units."""
