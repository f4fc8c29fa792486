"""What a type checker must flag: an argument that is spelled wrong. Never run."""

import fleetopt_jax as fo

workload = fo.load_workload("azure-conv")
problem = fo.make_problem(workload, [fo.EngineSpec("h100")], n_poools=3)
