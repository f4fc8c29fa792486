"""Table 1: tokens per watt against the context window, Llama-3.1-70B on H100 and B200."""

from _tables import run

run(1)
