"""Weights in 4 bits: code books, blocks, double quantization, the linear layer, and whole models."""
