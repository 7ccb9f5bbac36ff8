"""A model of the GPU tests, and the engines and trainers made of it."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comparisons import output_differences

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.kernels import numerics
from lockstep.kernels.linear import linear
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig

# The plainest way of serving: nothing captured, overlapped, shared or cached.
PLAIN = {"cuda_graphs": False, "overlap": False, "group_prefixes": False, "enable_prefix_cache": False}

# Room for split-K: the libraries' own defaults, set because a child inherits what numerics.set_up has set.
SPLIT_K_ENVIRONMENT = {"CUBLASLT_WORKSPACE_SIZE": "32768", "CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}


@dataclass(frozen=True)
class Setup:
    """A model directory without weights, and where engines and trainers of it run."""

    shape: str
    path: str
    device: str
    dtype: str
    vocab_size: int
    max_position_embeddings: int

    @property
    def longest(self) -> int:
        """The longest sequence that the tests use."""
        return min(8192, self.max_position_embeddings)

    @contextlib.contextmanager
    def engine(self, **settings: Any) -> Iterator[Engine]:
        """An engine of random weights, with room for sixteen of the longest sequences unless told otherwise."""
        defaults = {
            "model": self.path,
            "device": self.device,
            "dtype": self.dtype,
            "load_format": "dummy",
            "max_running_requests": 512,
            "max_model_len": self.longest,
            "kv_cache_tokens": 16 * self.longest,
        }
        engine = Engine(EngineConfig(**{**defaults, **settings}))
        try:
            yield engine
        finally:
            engine.shutdown()
            free_memory()

    def trainer(self, **settings: Any) -> MegatronTrainer:
        """A trainer of the same random weights."""
        common = {"model": self.path, "device": self.device, "dtype": self.dtype, "load_format": "dummy"}
        return MegatronTrainer(TrainerConfig(**{**common, "max_tokens_per_micro_batch": self.longest, **settings}))


def free_memory() -> None:
    """Gives back what dropped engines and trainers held of the GPU; their modules refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def differences_under_split_k(setup: Setup) -> list[str]:
    """With cuBLAS as it comes, for any number of rows, and no self-check: prefill in small chunks against one chunk.

    For a process of its own, since cuBLAS reads its settings once: see SPLIT_K_ENVIRONMENT.
    """
    numerics.set_up = lambda device: None
    numerics.check_row_contract = lambda *arguments: None
    linear._DECODE_MAX_ROWS = linear._TRITON_MAX_ROWS = 0
    prompts = [[(7 * i + j) % setup.vocab_size for j in range(length)] for i, length in enumerate((300, 700, 1500))]
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=3)
    outputs = []
    for chunk in (8192, 48, 130, 384):
        with setup.engine(**PLAIN, max_prefill_tokens=chunk) as engine:
            outputs.append(engine.generate(prompts, params))
    return [line for other in outputs[1:] for line in output_differences(outputs[0], other)]
