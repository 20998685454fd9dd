"""Benchmarks: one short file an operator, the training step, and the harness that times columns side by side."""
