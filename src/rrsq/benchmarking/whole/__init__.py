"""Timing whole models beside what else there is: ``rrsq bench --whole``.

An engine is vLLM or transformers. A contender is a model in an engine: the checkpoint, or what the engine
offers by itself for a model of the same shape. Each runs in a process of its own (``process.py`` starts
``worker.py``), so that what one leaves behind, compiled code or memory, is not the next one's.
"""
