"""Measuring what a pruner costs and saves."""
