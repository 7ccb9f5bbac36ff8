"""The model families that the engine serves and the trainer trains. A new one is a file here and a line below."""

from lockstep.engine.models.families import llama, mistral, qwen2, qwen3, qwen3_moe
from lockstep.engine.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
