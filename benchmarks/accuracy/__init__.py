"""How accurate is each solver, at what cost, and are the scores right? `python -m benchmarks.accuracy --help`."""
