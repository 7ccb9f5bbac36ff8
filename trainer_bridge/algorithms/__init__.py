"""Reinforcement-learning algorithms: advantages, losses, and their options."""
