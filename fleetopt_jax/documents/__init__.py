"""What is written: plans, fronts and every other answer as JSON objects in SI units, and read back."""
