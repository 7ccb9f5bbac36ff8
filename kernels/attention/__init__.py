"""Attention over paged and packed keys and values, forward and backward."""
