"""KV memory: pages, and the prefix cache over them."""
