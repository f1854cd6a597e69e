"""Training: the LightningModules, their data stream, strategies, checkpoints, and the run directory."""
