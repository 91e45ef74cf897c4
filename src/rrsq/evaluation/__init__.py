"""Evaluation: perplexity, the tasks of ``rrsq eval``, and the report they give."""
