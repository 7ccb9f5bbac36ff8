"""Multi-head latent attention: its cache, projections and attention."""
