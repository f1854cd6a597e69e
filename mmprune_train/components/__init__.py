"""Pruning components: what each declares of itself where it is written, and how it is found. Standard library only."""
