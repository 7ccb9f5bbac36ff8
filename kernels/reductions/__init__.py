"""Hashes and exact sums of whole tensors."""
