"""Products with weights, also fused with the gate, and split over ranks."""
