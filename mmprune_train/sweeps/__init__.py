"""Sweeps (`-m`): every job leaves a record in the sweep directory, wherever it runs (`reporting/sweeps.py`)."""
