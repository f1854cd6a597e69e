"""Public benchmarks: their official files on disk, the prompts that LLaVA-1.5 was measured with, and their own metrics.

A benchmark is a list of items, a metric that scores one item and its prediction, and an aggregate over those scores
(`declared.py` has them all). Nothing here knows which model answers.
"""
