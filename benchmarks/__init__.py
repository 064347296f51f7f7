"""Commands that measure; results in benchmarks/results/."""
