"""Search: each method turns a `Problem` into a `Plan` with the same fields."""
