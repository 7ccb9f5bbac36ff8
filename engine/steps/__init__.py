"""How a step is computed: layout, graphs or eager launches, sampling, drafts, results; capture of hidden states."""
