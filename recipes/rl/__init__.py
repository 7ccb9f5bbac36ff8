"""The training loops: reinforcement learning and supervised fine-tuning."""
