"""Table 5: four GPU generations at 8K, with tokens per dollar."""

from _tables import run

run(5)
