"""From a model and a recipe to a checkpoint on disk, resumably."""
