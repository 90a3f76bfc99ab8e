"""Benchmarks: this library against the ones people use, as ratios. `make bench` runs all of them."""
