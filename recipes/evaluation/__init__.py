"""Held-out evaluation, and replay of stored rollouts."""
