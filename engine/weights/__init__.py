"""The weights that an engine serves, and their replacement in place."""
