"""A run on disk and on screen: directory, metrics, logs, report."""
