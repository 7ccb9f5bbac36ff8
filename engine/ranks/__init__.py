"""Tensor and expert parallelism: processes, groups, and what ranks tell each other."""
