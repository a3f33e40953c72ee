"""Benchmarks of speed, memory and quality: `make bench`, `make quality`."""
