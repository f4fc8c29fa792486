"""Table 3: fleets for the Azure and LMSYS CDFs, homogeneous, pool routing and FleetOpt."""

from _tables import run

run(3)
