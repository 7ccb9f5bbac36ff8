"""Norms and rotary embeddings."""
