"""The paper's tables beside what was measured: docs/results.md and .csv."""
