"""Lockstep: reinforcement learning of language models with an engine and a trainer that agree to the bit.

The packages beside this one in the repository are installed below it: `lockstep.engine`, `lockstep.trainer_bridge`, ...
"""

__version__ = "0.1.0"
