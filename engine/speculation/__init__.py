"""Exact speculation: tokens drafted ahead are verified by one pass of the target, and change no bit of the output."""
