"""A draft directory of any layout that is read, written anew as SGLang or vLLM load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lockstep.engine.checkpoints.checkpoint import iterate_weights
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.models.config import load_model_config
from lockstep.engine.speculation.config import LayerIds, ServingEngine

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def convert_draft(
    draft: str,
    model: str,
    output: str,
    export_for: ServingEngine | None,
    numbers_of: LayerIds,
    allow_pickle: bool,
) -> dict[str, Any]:
    """Reads the draft beside its target `model`, and writes `output`. Raises ValueError; see `load_draft`."""
    if Path(output).exists():
        raise ValueError(f"convert: {output} exists; choose another output")
    target = load_model_config(model)
    shared: dict[str, torch.Tensor] = {}
    for name, tensor in iterate_weights(model, target):
        if name in (_EMBEDDING, _HEAD):
            shared[name] = tensor.clone()
    embedding = shared[_EMBEDDING]
    loaded = load_draft(
        draft,
        target,
        embedding,
        head_weight=shared.get(_HEAD, embedding),
        numbers_of=numbers_of,
        allow_pickle=allow_pickle,
    )
    engine = save_draft(output, loaded, export_for=export_for, target=target)
    return {"output": output, "layer_ids_for": engine, "aux_layers": list(loaded.config.aux_layers)}
