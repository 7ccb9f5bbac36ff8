"""The trained model on Megatron-core: layers, optimizer, pipeline, checkpoints."""
