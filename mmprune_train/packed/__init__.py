"""The packed batch: all samples of a batch in one row of tokens, what crosses to the device, and the trace."""
