"""What a run needs, and what it refuses, before it starts."""
