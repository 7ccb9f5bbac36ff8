"""Draft models: trained offline, or while reinforcement learning goes on."""
