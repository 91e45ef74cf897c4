"""From a checkpoint to one that other engines read without rrsq."""
