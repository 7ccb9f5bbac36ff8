"""Between text and tokens: tokenizers, chat templates, ends of turns, stop strings."""
