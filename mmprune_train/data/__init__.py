"""From annotation files to packed batches: sources, records, conversations, examples, batches."""
