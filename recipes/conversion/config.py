"""The options of `lockstep convert`."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.engine.fields.field_types import Size, Text, check_fields
from lockstep.engine.speculation.config import LayerIds, ServingEngine


@dataclass(frozen=True)
class ConvertConfig:
    """model: an HF directory of the same architecture (its config and tokenizer are copied); or a GGUF file,
    which llama.cpp reads; its dequantised model is written to `output` in float32.
    checkpoint: a folder that a trainer saved, such as runs/NAME/checkpoints/step_000100/trainer; null takes the
    weights of `model`. output: where the HF directory is written.
    draft: an EAGLE-3 draft directory of the target `model`, in any layout that is read, to be written to `output` for
    the engine export_for: "sglang" or "vllm", which number the target's layers differently. draft_layer_ids: whose
    numbers stand in `draft`; "auto": as the directory says.
    allow_pickle: read files that hold pickles, to write them as safetensors: pytorch_model.bin of `model` or `draft`;
    what an earlier version saved: with checkpoint and new_checkpoint that folder, with `run` all checkpoints of a run
    directory, in their place. Say true only for files whose origin you trust: a pickle can be made to run code. (The
    readers here refuse what tensors and checkpoints do not need.)
    table: print the table of names instead.
    plan: print instead which slices travel when a trainer of trainer_tp x trainer_pp ranks publishes its weights to
    engine_replicas engines of engine_tp ranks. trainer_ep, engine_ep: over how many of the ranks of trainer_tp and of
    engine_tp experts are shared out: 1 or all.
    """

    model: Text | None = None
    checkpoint: Text | None = None
    output: Text | None = None
    draft: Text | None = None
    export_for: ServingEngine | None = None
    draft_layer_ids: LayerIds = "auto"
    new_checkpoint: Text | None = None
    run: Text | None = None
    allow_pickle: bool = False
    table: bool = False
    plan: bool = False
    trainer_tp: Size = 1
    trainer_pp: Size = 1
    trainer_ep: Size = 1
    engine_tp: Size = 1
    engine_ep: Size = 1
    engine_replicas: Size = 1

    def __post_init__(self):
        check_fields(self)
