"""Table 2: architectures at 8K, dense and MoE, on the paper's roofline engines."""

from _tables import run

run(2)
