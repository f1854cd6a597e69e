"""Weights on disk: where they lie, what a folder holds, whether it is whole and fits what is chosen, and what training
starts from."""
