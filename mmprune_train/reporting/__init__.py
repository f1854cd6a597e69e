"""What runs and sweeps have left, read and shown."""
