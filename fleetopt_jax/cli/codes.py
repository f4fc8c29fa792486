"""Exit codes of every command."""

OK = 0
BUG = 1
BAD_INPUT = 2
INFEASIBLE = 3
INTERRUPTED = 130
