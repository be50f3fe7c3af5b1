"""Sessions on a GPU of limited time: tests and benchmarks, then a row of the paper."""
