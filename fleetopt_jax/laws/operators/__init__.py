"""What one operator takes on one GPU, a class of operators a file: pure functions over records of coefficients."""
