"""`--dry-run`: what a run would do and need, by arithmetic alone. It loads no weights and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from lockstep.engine.models.config import ModelConfig
from lockstep.recipes.inputs import ModelSource
from lockstep.recipes.memory import Item, engine_memory, kv_bytes_per_token, num_parameters, trainer_memory
from lockstep.recipes.room import rl_with_room, sft_with_room
from lockstep.rollout.environments import SINGLE_TURN
from lockstep.rollout.tasks import Task
from lockstep.rollout.tokenizer import encode_response, render_prompt
from lockstep.trainer_bridge.algorithms import build_algorithm

if TYPE_CHECKING:
    from lockstep.recipes.rl import RLConfig
    from lockstep.recipes.sft import SFTConfig
    from lockstep.recipes.training_run import TrainingRunConfig

LOOKED_AT = 64  # problems whose prompts are measured

Row = tuple[str, str, str]  # name, value, how it comes about


@dataclass
class Plan:
    """Tables for people, and what makes the run impossible."""

    title: str
    sections: dict[str, list[Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def dry_run(plan: Plan) -> dict[str, Any]:
    """Prints the plan. Raises ValueError that lists why the run cannot work, if it cannot."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(f"[bold]{plan.title}[/]  (dry run: nothing is started)")
    for title, rows in plan.sections.items():
        table = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
        table.add_column(min_width=26)
        table.add_column(justify="right", min_width=12)
        table.add_column(style="dim")
        for row in rows:
            table.add_row(*row)
        console.print(f"\n[bold]{title}[/]")
        console.print(table)
    if plan.problems:
        raise ValueError("this run cannot work:\n" + "\n".join(f"- {problem}" for problem in plan.problems))
    return {title: {name: value for name, value, _ in rows} for title, rows in plan.sections.items()}


def rl_plan(config: RLConfig) -> Plan:
    tasks, crowded = config.task.build(), []
    further = {name: task.build().held_out for name, task in config.evaluation_tasks.items()}
    try:
        tasks, _ = rl_with_room(config, tasks, further)
    except ValueError as error:
        crowded.append(str(error))
    model, tokenizer = config.model.described(tasks.train, config.chat)
    prompts = _prompt_lengths(tokenizer, tasks.train)
    plan = Plan(f"lockstep rl: {config.directory}")
    plan.sections["Model"] = _model_rows(config.model, model)
    plan.sections["A step"] = _rollout_rows(config, prompts, model)
    plan.sections["The run"] = _run_rows(config, len(tasks.train), config.rollout.prompts_per_step, model)
    plan.sections["The run"].append(_evaluation_row(config))
    is_remote = config.cluster.kind == "ray"
    num_ranks = config.cluster.trainer_ranks
    trainer = trainer_memory(model, config.trainer, num_ranks)
    engine = engine_memory(model, config.engine, is_remote=is_remote)
    algorithm = build_algorithm(config.algorithm, config.rollout.max_tokens)
    if algorithm.needs_reference:
        trainer.append(replace(trainer[0], name="reference model", how="its weights, for the KL penalty"))
    plan.sections[f"Memory of the trainer ({_ranks(num_ranks)})"] = _memory_rows(trainer)
    learning = [trainer]
    if algorithm.critic:
        learning.append(trainer_memory(model.with_scalar_head(), config.trainer, num_ranks))
        plan.sections["Memory of the critic (beside the trainer)"] = _memory_rows(learning[-1])
    title = f"Memory of the engine ({config.cluster.num_engines} x {_ranks(config.engine.tp_size)})"
    plan.sections[title] = [*_memory_rows(engine), *_kv_rows(config, model, prompts)]
    longest = _longest_sequence(config, prompts, model)
    allowed = config.engine.max_model_len or model.max_position_embeddings
    plan.problems += crowded
    plan.problems += _too_long(max(prompts) + 1, allowed, longest, config.trainer.max_tokens_per_micro_batch)
    if (kv_tokens := config.engine.kv_cache_tokens) is not None and kv_tokens < longest:
        plan.problems.append(f"engine.kv_cache_tokens={kv_tokens:,} is less than one sequence of {longest:,} tokens")
    plan.problems += _too_big(config.trainer.device, learning if is_remote else [*learning, engine])
    return plan


def sft_plan(config: SFTConfig) -> Plan:
    tasks = sft_with_room(config, config.task.build())
    model, tokenizer = config.model.described(tasks.train, config.chat)
    prompts = _prompt_lengths(tokenizer, tasks.train)
    solutions = [tasks.train.problem(index).solution for index in range(min(LOOKED_AT, len(tasks.train)))]
    lengths = [n + len(encode_response(tokenizer, text)) for n, text in zip(prompts, solutions, strict=True)]
    budget, tokens = config.trainer.max_tokens_per_micro_batch, round(sum(lengths) / len(lengths))
    per_step = config.examples_per_step * tokens
    plan = Plan(f"lockstep sft: {config.directory}")
    plan.sections["Model"] = _model_rows(config.model, model)
    plan.sections["A step"] = [
        (
            "tokens",
            f"{per_step:,}",
            f"{config.examples_per_step} examples x {tokens} (mean of {len(lengths)} looked at)",
        ),
        ("micro-batches", f"{math.ceil(per_step / budget):,}", f"of at most {budget:,} tokens"),
    ]
    plan.sections["The run"] = _run_rows(config, len(tasks.train), config.examples_per_step, model)
    num_ranks = config.trainer.tensor_parallel_size * config.trainer.pipeline_parallel_size
    trainer = trainer_memory(model, config.trainer, num_ranks)
    plan.sections[f"Memory of the trainer ({_ranks(num_ranks)})"] = _memory_rows(trainer)
    plan.problems += _too_long(max(lengths), model.max_position_embeddings, max(lengths), budget)
    plan.problems += _too_big(config.trainer.device, [trainer])
    return plan


def _prompt_lengths(tokenizer: PreTrainedTokenizerBase, task: Task) -> list[int]:
    problems = [task.problem(index) for index in range(min(LOOKED_AT, len(task)))]
    return [len(render_prompt(tokenizer, problem.messages)) for problem in problems]


def _model_rows(source: ModelSource, model: ModelConfig) -> list[Row]:
    shape = f"{model.num_layers} layers, hidden {model.hidden_size:,}, vocabulary {model.vocab_size:,}"
    return [
        ("parameters", f"{num_parameters(model):,}", shape),
        ("from", model.family, source.path or "made from nothing"),
        ("longest sequence", f"{model.max_position_embeddings:,}", "positions of the model"),
    ]


def _rollout_rows(config: RLConfig, prompts: Sequence[int], model: ModelConfig) -> list[Row]:
    rollout, budget, algorithm = config.rollout, config.trainer.max_tokens_per_micro_batch, config.algorithm
    per_update = math.ceil(rollout.prompts_per_step / algorithm.mini_batches) * rollout.samples_per_prompt
    dealt = f"{algorithm.epochs} epochs x {algorithm.mini_batches} mini-batches"
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    turns = 1 if config.environment.kind == SINGLE_TURN else config.environment.max_turns
    per_turns = f" x {turns} turns" if turns > 1 else ""
    most = samples * turns * rollout.max_tokens
    mean_prompt, longest = round(sum(prompts) / len(prompts)), _longest_sequence(config, prompts, model)
    return [
        ("samples", f"{samples:,}", f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples"),
        ("prompt tokens", f"{mean_prompt:,}", f"mean of {len(prompts)} looked at; longest {max(prompts):,}"),
        ("generated tokens", f"<= {most:,}", f"{samples:,} samples x {rollout.max_tokens} tokens{per_turns}"),
        ("updates", f"{algorithm.updates_per_step:,}", dealt),
        ("micro-batches", f"<= {math.ceil(per_update / max(1, budget // longest)):,}", _packing(longest, budget)),
    ]


def _packing(longest: int, budget: int) -> str:
    return f"an update; of {budget:,} tokens: {budget // longest} or more sequences of at most {longest:,}"


def _longest_sequence(config: RLConfig, prompts: Sequence[int], model: ModelConfig) -> int:
    """Of a prompt that was looked at with the longest response, or of an episode. The model's length bounds both."""
    longest = config.engine.max_model_len or model.max_position_embeddings
    if config.environment.kind == SINGLE_TURN:
        return min(max(prompts) + config.rollout.max_tokens, longest)
    return min(config.environment.max_episode_tokens or longest, longest)


def _run_rows(config: TrainingRunConfig, num_problems: int, per_step: int, model: ModelConfig) -> list[Row]:
    epochs = config.steps * per_step / num_problems
    size = 2 if config.trainer.dtype == "bfloat16" else 4
    state = num_parameters(model) * (size + (12 if size == 2 else 8))
    kept = f"{config.keep_checkpoints} kept" if config.keep_checkpoints else "all kept"
    return [
        ("steps", f"{config.steps:,}", f"{epochs:.3g} epochs of {num_problems:,} problems"),
        ("a checkpoint", _size(state), f"weights and optimizer, every {config.checkpoint_every} steps; {kept}"),
    ]


def _evaluation_row(config: RLConfig) -> Row:
    times = 1 + config.steps // config.evaluate_every + (config.steps % config.evaluate_every > 0)
    evaluation = config.evaluation
    each = evaluation.num_problems * evaluation.samples_per_problem * (1 + len(config.evaluation_tasks))
    return ("evaluations", f"{times:,}", f"of at most {each:,} samples of {evaluation.max_tokens} tokens")


def _memory_rows(items: Sequence[Item]) -> list[Row]:
    total = sum(item.num_bytes for item in items)
    return [(item.name, _size(item.num_bytes), item.how) for item in items] + [("in all", _size(total), "")]


def _kv_rows(config: RLConfig, model: ModelConfig, prompts: Sequence[int]) -> list[Row]:
    """What the requests of a step would fill, if all ran at once to their longest; prompts of a group are shared."""
    rollout, engine = config.rollout, config.engine
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    own = _longest_sequence(config, prompts, model) - max(prompts)
    running = min(engine.max_running_requests, math.ceil(samples / config.cluster.num_engines))
    groups = math.ceil(running / rollout.samples_per_prompt)
    tokens = running * own + groups * max(prompts)
    wanted = tokens * kv_bytes_per_token(model, engine)
    rows = [("KV that a step can fill", _size(wanted), f"{running} running x {own:,} tokens + {groups} prompts")]
    if engine.kv_cache_tokens is None:
        free = f"{engine.memory_fraction:.0%} of the free memory" if engine.device != "cpu" else "up to 512 MiB"
        rows.insert(0, ("KV cache", "the rest", free))
    return rows


def _too_long(needed: int, allowed: int, longest: int, budget: int) -> list[str]:
    """needed, longest: tokens that some sequence has at the least, and may have."""
    problems = []
    if needed > allowed:
        problems.append(f"a sequence has {needed:,} tokens or more, and the model takes {allowed:,}")
    if longest > budget:
        problems.append(
            f"a sequence can have {longest:,} tokens, and trainer.max_tokens_per_micro_batch={budget:,}: raise that, "
            "or allow fewer tokens"
        )
    return problems


def _too_big(device: str, parts: Sequence[Sequence[Item]]) -> list[str]:
    """Where the run's GPU is here: do its processes fit?"""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return []
    total = torch.cuda.get_device_properties(torch.device(device)).total_memory
    needed = sum(item.num_bytes for items in parts for item in items)
    return [f"{_size(needed)} are needed on {device}, which has {_size(total)}"] if needed > total else []


def _ranks(count: int) -> str:
    return "one process" if count == 1 else f"each of {count} ranks"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"
