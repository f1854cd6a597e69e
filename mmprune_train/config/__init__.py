"""The settings of a run: what they are (`schema`), where they come from (`compose`), what they must be (`checks`)."""
