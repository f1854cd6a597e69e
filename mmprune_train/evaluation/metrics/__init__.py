"""Scores of answers as the benchmarks' own scorers give them, one rule a module; standard library only.

Each function says which scorer it agrees with; tests/evaluation/recorded holds what that scorer gave.
"""
