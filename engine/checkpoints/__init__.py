"""Model and draft directories: read, written, exported."""
