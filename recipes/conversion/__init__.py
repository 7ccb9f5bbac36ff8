"""Model directories from checkpoints and from other formats."""
