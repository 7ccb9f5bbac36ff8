"""The engines that can be timed, behind one call: requests in, number of generated tokens out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.recipes.bench.config import BenchConfig
from lockstep.recipes.bench.shapes import write_model_directory
from lockstep.recipes.bench.workloads import Requests

MAX_RUNNING_REQUESTS = 1024
_TRANSFORMERS_BATCH = 64  # its KV cache is not paged: more rows of thousands of tokens do not fit

Generate = Callable[[Requests, int], int]  # requests, seed -> tokens generated


@dataclass(frozen=True)
class Candidate:
    """open(path, config): a context in which the engine serves the model directory; it is shut down at the end."""

    open: Callable[[str, BenchConfig], AbstractContextManager[Generate]]
    package: str = "lockstep"
    environment: Mapping[str, str] = field(default_factory=dict)


def candidates(peer: str | None) -> dict[str, Candidate]:
    """Lockstep and the peer. Raises ValueError for an unknown peer and for one that is not installed."""
    if peer is None:
        return {"lockstep": CANDIDATES["lockstep"]}
    if peer not in CANDIDATES or peer == "lockstep":
        raise ValueError(f"bench: unknown peer {peer!r}; known: {', '.join(CANDIDATES.keys() - {'lockstep'})}")
    package = CANDIDATES[peer].package
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"bench: peer={peer} needs the package {package}, which is not here: pip install {package}")
    return {name: CANDIDATES[name] for name in ("lockstep", peer)}


def engine_config(path: str, config: BenchConfig) -> EngineConfig:
    """Lockstep's settings for a benchmark. Raises ValueError for a key of config.engine that EngineConfig lacks."""
    known = {field.name for field in fields(EngineConfig)}
    for name in config.engine:
        if name not in known:
            raise ValueError(f"bench: engine.{name} is no field of EngineConfig, which has {', '.join(sorted(known))}")
    settings = {
        "model": path,
        "device": config.device,
        "dtype": config.dtype,
        "load_format": _load_format(config),
        "max_running_requests": MAX_RUNNING_REQUESTS,
    }
    return EngineConfig(**{**settings, **config.engine})


def _load_format(config: BenchConfig) -> str:
    return "dummy" if config.model is None else "auto"


@contextmanager
def _lockstep(path: str, config: BenchConfig) -> Iterator[Generate]:
    engine = Engine(engine_config(path, config))

    def generate(requests: Requests, seed: int) -> int:
        params = [
            SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True, seed=(seed << 32) + index)
            for index, length in enumerate(requests.output_tokens)
        ]
        return sum(len(output.token_ids) for output in engine.generate(requests.prompts, params))

    yield generate
    engine.shutdown()


@contextmanager
def _transformers(path: str, config: BenchConfig) -> Iterator[Generate]:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    with torch.device(config.device):
        if config.model is None:
            shape = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        else:
            safe = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **safe)
    model = model.to(config.device).eval()

    def generate(requests: Requests, seed: int) -> int:
        torch.manual_seed(seed)
        for start in range(0, len(requests.prompts), _TRANSFORMERS_BATCH):
            lengths = requests.output_tokens[start : start + _TRANSFORMERS_BATCH]
            inputs = torch.tensor(
                requests.prompts[start : start + _TRANSFORMERS_BATCH], device=config.device, dtype=torch.int64
            )
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max(lengths),
                min_new_tokens=max(lengths),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
            )
        return sum(requests.output_tokens)  # a row that is done goes on until the batch's longest is

    yield generate


@contextmanager
def _vllm(path: str, config: BenchConfig) -> Iterator[Generate]:
    import vllm

    llm = vllm.LLM(
        model=path,
        load_format=_load_format(config),
        dtype=config.dtype,
        skip_tokenizer_init=True,
        max_num_seqs=MAX_RUNNING_REQUESTS,
        enable_prefix_caching=True,
    )

    def generate(requests: Requests, seed: int) -> int:
        # Without seeds: vLLM draws rows with seeds of their own one by one.
        params = [
            vllm.SamplingParams(max_tokens=length, temperature=1.0, ignore_eos=True, detokenize=False)
            for length in requests.output_tokens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    yield generate


@contextmanager
def _sglang(path: str, config: BenchConfig, deterministic: bool = False) -> Iterator[Generate]:
    import sglang

    engine = sglang.Engine(
        model_path=path,
        load_format=_load_format(config),
        dtype=config.dtype,
        skip_tokenizer_init=True,
        max_running_requests=MAX_RUNNING_REQUESTS,
        enable_deterministic_inference=deterministic,
    )

    def generate(requests: Requests, seed: int) -> int:
        params: list[dict[str, Any]] = [
            {"max_new_tokens": length, "temperature": 1.0, "ignore_eos": True} for length in requests.output_tokens
        ]
        outputs = engine.generate(input_ids=requests.prompts, sampling_params=params)
        return sum(output["meta_info"]["completion_tokens"] for output in outputs)

    yield generate
    engine.shutdown()


def _sglang_deterministic(path: str, config: BenchConfig) -> AbstractContextManager[Generate]:
    return _sglang(path, config, deterministic=True)


CANDIDATES: dict[str, Candidate] = {
    "lockstep": Candidate(_lockstep),
    "transformers": Candidate(_transformers, "transformers"),
    "vllm": Candidate(_vllm, "vllm"),
    "vllm-batch-invariant": Candidate(_vllm, "vllm", {"VLLM_BATCH_INVARIANT": "1"}),
    "sglang": Candidate(_sglang, "sglang"),
    "sglang-deterministic": Candidate(_sglang_deterministic, "sglang"),
}


def model_directory(config: BenchConfig, scratch: Path) -> str:
    """The directory to serve: the user's, or a new one of the shape, without weights."""
    return config.model or write_model_directory(config.model_name, scratch / "model")
