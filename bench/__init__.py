"""Benchmarks: this library against the ones people use, as ratios. `make bench` runs all of them."""

import utils  # noqa: F401  before peft, so that peft's import is quiet
