"""Reads and writes of tables in device memory: the KV cache, embeddings, a step's inputs."""
