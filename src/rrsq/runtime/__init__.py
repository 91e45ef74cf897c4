"""What a finished checkpoint needs to run: modules, KV cache, rotations, the format and its loading."""
