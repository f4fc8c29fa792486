"""What each assumption means: frozen records with methods, one file a choice, two records or more in each.

A record of your own is passed in like ours: derive from the choice's base class, give it a `name`, say its methods.
Records are static under `jit`: they hold choices, not traced numbers, and equal ones share a compilation.
"""
