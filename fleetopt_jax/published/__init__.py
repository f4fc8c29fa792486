"""The 1/W Law (arXiv 2603.17280v1) as printed: its engines, its sampling procedure and its tables.

For `reproduce`, the ledgers and the experiments only: no law imports this room.
"""
