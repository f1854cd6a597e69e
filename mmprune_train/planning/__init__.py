"""What a run will cost, from its config alone: parameters, tokens, FLOPs, memory, hours, disk."""
