"""The pretrained model that `make smollm2` puts in place: SmolLM2-135M-Instruct (Apache-2.0)."""

from pathlib import Path

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"
WHY_NOT = f"needs {MODEL.name}: make smollm2"
