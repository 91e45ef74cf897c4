"""From a model to a checkpoint: folding, calibration, GPTQ, and the production of the files."""
