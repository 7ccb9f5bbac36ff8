"""Training of EAGLE-3 drafts."""
