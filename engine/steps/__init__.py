"""How a step is computed: layout, graphs, sampling, capture of hidden states."""
