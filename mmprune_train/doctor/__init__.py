"""What `task=doctor` looks at: the machine, what a run can compute with on it, and a step that is tried."""
