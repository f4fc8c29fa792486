"""Traffic: joint (prompt, output) lengths as weighted atoms, and how it is read from traces and CDFs."""
