"""Benchmarks: suites of shapes, an interleaving harness, limits and peers."""
