"""Names to records: GPUs, LLMs, engines and bundled workloads, each number with its source."""
