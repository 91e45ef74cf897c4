"""Weight quantizers and the pipeline that applies a recipe to a model."""
