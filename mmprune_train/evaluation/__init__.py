"""Evaluation: questions, batched answers, scores."""
