"""Table 4: context routing against semantic routing, per pool, on H100."""

from _tables import run

run(4)
