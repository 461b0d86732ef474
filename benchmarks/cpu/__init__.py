"""Products, gathers and calls of layers on a CPU, beside peers: ``pytest benchmarks --benchmark-only``."""
