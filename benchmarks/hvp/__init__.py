"""What does a Hessian-vector product cost, by which strategy, on which model? `python -m benchmarks.hvp --help`."""
