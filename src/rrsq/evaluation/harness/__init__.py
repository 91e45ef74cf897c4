"""Zero-shot and few-shot tasks of lm-eval (EleutherAI's lm-evaluation-harness), run on a loaded model.

The tasks, prompts, metrics and their aggregation are lm-eval's own; here are their short names, where their
data are found on a disk, how many questions are run at a time, and what is shown meanwhile. lm-eval is
imported only when such a task is prepared.
"""
