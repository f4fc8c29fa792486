"""InferenceX (InferenceMAX): rows of one configuration at one concurrency, latencies in seconds."""

from fleetopt_jax.calibrate.readers.rows import Record

LAYOUT = "InferenceX"


def records(document: Record) -> list[Record] | None:
    """One row; None where it is no such row."""
    return [document] if document.keys() >= {"hw", "conc", "framework"} else None
