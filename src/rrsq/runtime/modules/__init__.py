"""The modules of a quantized model: linears, experts, quantizers of inputs, online rotations."""
