"""The model families that the engine serves and the trainer trains. A new one is a file here and a line below."""

from lockstep.engine.models.families import deepseek_v2, deepseek_v3, llama, mistral, qwen2, qwen3, qwen3_moe
from lockstep.engine.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
