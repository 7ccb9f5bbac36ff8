"""The options of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from lockstep.engine.fields.field_types import InputPath
from lockstep.engine.fields.values import (
    SECONDS,
    Choice,
    Real,
    Rule,
    Whole,
    conform,
    device_name,
    dtype_name,
    flag,
    optional,
    path,
    power_of_two,
    text,
)
from lockstep.engine.speculation.config import MAX_DRAFT_TOKENS, NGRAM, LayerIds


@dataclass(frozen=True)
class EngineConfig:
    """What an engine serves and how much memory it may take. Raises ValueError that names the field and its value.

    model: an HF directory (config.json, safetensors, optionally a tokenizer).
    device, dtype: "cpu" with "float32", or "cuda" with "bfloat16".
    load_format: "auto" reads the directory's weights; "dummy" makes random ones (from `seed`), for benchmarks.
    page_size: tokens of KV in a page, the unit of sharing between requests. None: 16 on a CPU, 64 on a GPU.
    max_running_requests: requests that decode together.
    max_prefill_tokens: prompt tokens computed in one step (the prefill chunk).
    kv_cache_tokens: tokens of KV held. None: up to 512 MiB on a CPU, `memory_fraction` of the free memory on a GPU.
    max_model_len: longest prompt plus output. None: the model's max_position_embeddings.
    cuda_graphs: on a GPU, decode steps are replayed as graphs.
    group_prefixes: on a GPU, attention reads a prefix that decoding requests share once for all of them.
    overlap: on a GPU, a step is scheduled while the one before still runs.
    row_parallel_splits: the parts, a power of two, in which the sums of the row-parallel products are taken: a setting
        of the numerics, which a trainer must share. See kernels.row_parallel_linear.
    linear_format: what is stored of the weights of the layers' products, see models.layers.linear: a setting of the
        numerics too, which a trainer must share.
    tp_size: processes, on as many GPUs or on the CPU, that each hold a part of every layer and of the KV. It divides
        row_parallel_splits and changes no bit. multiprocessing spawns them, so a script's `__main__` has its guard.
        Decode steps are then not captured in graphs.
    ep_size: of a model with experts: tp_size, and the processes share out the experts of each layer, whole; or 1, and
        each holds all experts, which takes more memory and saves an exchange per layer. It changes no bit either.
    rank_timeout_s: how long one of them may keep the others waiting before the engine gives it up.
    rank_start_timeout_s: how long they may take to start and to read their weights.
    draft_model: what drafts tokens ahead: "ngram" (copies from the request's text and its group's), or the directory
        of an EAGLE-3 model in the format of SGLang and vLLM. None: nothing does. It changes no bit of any output.
    draft_layer_ids: whose numbers of the target's layers stand in a draft's config.json: "sglang"'s or "vllm"'s, which
        differ by one. "auto": as the directory says, see draft_config.py.
    num_draft_tokens: drafts per request and step, 1 to 8.
    draft_max_requests: the most requests that decode together with drafts. None: as many as were measured to be faster
        with them, by batch size.
    draft_min_accepted: a request of whose drafts fewer than this are accepted per step goes on without for a while.
    """

    model: InputPath
    device: str = "cpu"
    dtype: str = "float32"
    load_format: str = "auto"
    seed: int = 0
    page_size: int | None = None
    max_running_requests: int = 256
    max_prefill_tokens: int = 8192
    kv_cache_tokens: int | None = None
    memory_fraction: float = 0.85
    max_model_len: int | None = None
    enable_prefix_cache: bool = True
    cuda_graphs: bool = True
    group_prefixes: bool = True
    overlap: bool = True
    row_parallel_splits: int = 1
    linear_format: str = "plain"
    tp_size: int = 1
    ep_size: int = 1
    rank_timeout_s: float = 120.0
    rank_start_timeout_s: float = 900.0
    draft_model: InputPath | None = None
    draft_layer_ids: LayerIds = "auto"
    num_draft_tokens: int = 0
    draft_max_requests: int | None = None
    draft_min_accepted: float = 0.25

    def __post_init__(self):
        conform(self, _RULES)
        if self.device.startswith("cpu") and self.dtype != "float32":
            raise ValueError(f"on the CPU the row contract holds in float32 only, got dtype={self.dtype!r}")
        self._check_speculation()

    def _check_speculation(self) -> None:
        if (self.draft_model is None) != (self.num_draft_tokens == 0):
            raise ValueError(
                f"EngineConfig: a draft_model needs num_draft_tokens, and the other way round, got "
                f"{self.draft_model!r} and {self.num_draft_tokens}"
            )
        if self.tp_size > 1 and self.has_draft_model:
            raise ValueError(f'EngineConfig.tp_size={self.tp_size} speculates with draft_model="{NGRAM}" only')

    @property
    def has_draft_model(self) -> bool:
        """Whether a model drafts, and not a rule."""
        return self.draft_model not in (None, NGRAM)


_RULES: dict[str, Rule] = {
    "model": path,
    "device": device_name,
    "dtype": dtype_name(("float32", "bfloat16", "float16")),
    "load_format": Choice(("auto", "dummy")),
    "seed": Whole(0),
    "page_size": Whole(1, 64, none=True),
    "max_running_requests": Whole(1, 2**20),
    "max_prefill_tokens": Whole(1),
    "kv_cache_tokens": Whole(1, none=True),
    "memory_fraction": Real(0.0, 1.0, "in (0, 1]", open_low=True),
    "max_model_len": Whole(1, none=True),
    "row_parallel_splits": power_of_two,
    "linear_format": text,
    "tp_size": Whole(1),
    "ep_size": Whole(1),
    "rank_timeout_s": SECONDS,
    "rank_start_timeout_s": SECONDS,
    "draft_model": optional(path),
    "draft_layer_ids": Choice(get_args(LayerIds)),
    "num_draft_tokens": Whole(0, MAX_DRAFT_TOKENS, expected=f"1 to {MAX_DRAFT_TOKENS}"),
    "draft_max_requests": Whole(0, none=True),
    "draft_min_accepted": Real(0.0, expected="a finite number of at least 0"),
} | dict.fromkeys(("enable_prefix_cache", "cuda_graphs", "group_prefixes", "overlap"), flag)
