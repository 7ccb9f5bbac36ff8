"""From logits to tokens and log-probs."""
