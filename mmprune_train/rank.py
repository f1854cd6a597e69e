"""Which of a run's processes this is, before a library that knows it better is imported."""

from __future__ import annotations

import os

VARIABLES = ("SUBMITIT_LOCAL_GLOBALID", "RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Submitit's, then in the order in which Lightning asks them: SLURM_PROCID may be set where Slurm starts no process."""


def global_rank() -> int:
    """Rank as the launcher tells it by the environment; 0 where nothing does."""
    return next((int(os.environ[name]) for name in VARIABLES if name in os.environ), 0)
