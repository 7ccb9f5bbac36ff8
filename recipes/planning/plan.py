"""`--dry-run`: what a run would do and need, by arithmetic alone. It loads no weights and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lockstep.engine.models.config import ModelConfig
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.inputs import sizes_and_tokenizer
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.fit import Fit, gpu_fit, host_fit, size
from lockstep.recipes.planning.memory import Item, engine_memory, kv_bytes_per_token, num_parameters, trainer_memory
from lockstep.recipes.planning.room import rl_with_room, sft_with_room
from lockstep.recipes.planning.start_checks import check_rl, check_stage
from lockstep.recipes.runs.config import ModelSource
from lockstep.recipes.training_run import check_directory
from lockstep.rollout.environments import SINGLE_TURN
from lockstep.rollout.rewards import check_reward
from lockstep.rollout.tasks import Task
from lockstep.rollout.tokenizer import encode_response, render_prompt
from lockstep.trainer_bridge.algorithms.algorithms import build_algorithm

if TYPE_CHECKING:
    from lockstep.recipes.rl.config import RLConfig, SFTConfig
    from lockstep.recipes.runs.config import TrainingRunConfig

LOOKED_AT = 64  # problems whose prompts are measured

Row = tuple[str, str, str]  # name, value, how it comes about


@dataclass
class Plan:
    """Tables for people, and what makes the run impossible."""

    title: str
    sections: dict[str, list[Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def plan_rl(config: RLConfig) -> dict[str, Any]:
    """`lockstep rl --dry-run`. Raises as `dry_run`, and ValueError for what a run would refuse."""
    config = resumed(config)
    check_reward(config.reward)
    return dry_run(rl_plan(config))


def plan_sft(config: SFTConfig) -> dict[str, Any]:
    """As `plan_rl`."""
    config = resumed(config)
    check_stage(config)
    return dry_run(sft_plan(config))


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
    tasks, refused = config.task.build(), []
    for check in (lambda: check_rl(config), lambda: check_directory(config, "rl")):
        try:
            check()
        except ValueError as error:
            refused.append(str(error))
    further = {name: task.build().held_out for name, task in config.evaluation_tasks.items()}
    try:
        tasks, _ = rl_with_room(config, tasks, further)
    except ValueError as error:
        refused.append(str(error))
    model, tokenizer = sizes_and_tokenizer(config.model, tasks.train, config.chat)
    prompts = _prompt_lengths(tokenizer, tasks.train)
    plan = Plan(f"lockstep rl: {config.directory}")
    plan.sections["Model"] = _model_rows(config.model, model)
    plan.sections["A step"] = _rollout_rows(config, prompts, model)
    plan.sections["The run"] = _run_rows(config, len(tasks.train), config.rollout.prompts_per_step, model)
    plan.sections["The run"].append(_evaluation_row(config))
    is_remote = config.cluster.kind == "ray"
    num_ranks = config.cluster.trainer_ranks
    longest = _longest_sequence(config, prompts, model)
    per_update = math.ceil(config.rollout.prompts_per_step / config.algorithm.mini_batches)
    most_tokens = per_update * config.rollout.samples_per_prompt * longest
    trainer = trainer_memory(model, config.trainer, num_ranks, most_tokens)
    engine = engine_memory(model, config.engine, is_remote=is_remote)
    algorithm = build_algorithm(config.algorithm, config.rollout.max_tokens)
    if algorithm.needs_reference:
        trainer.append(replace(trainer[0], name="reference model", how="its weights, for the KL penalty"))
    plan.sections[f"Memory of the trainer ({_ranks(num_ranks)})"] = _memory_rows(trainer)
    learning = [trainer]
    if algorithm.critic:
        learning.append(trainer_memory(model.with_scalar_head(), config.trainer, num_ranks, most_tokens))
        plan.sections["Memory of the critic (beside the trainer)"] = _memory_rows(learning[-1])
    title = f"Memory of the engine ({config.cluster.num_engines} x {_ranks(config.engine.tp_size)})"
    plan.sections[title] = [*_memory_rows(engine), *_kv_rows(config, model, prompts)]
    allowed = config.engine.max_model_len or model.max_position_embeddings
    plan.problems += refused
    plan.problems += _too_long(max(prompts) + 1, allowed, longest, config.trainer.max_tokens_per_micro_batch)
    if (kv_tokens := config.engine.kv_cache_tokens) is not None and kv_tokens < longest:
        plan.problems.append(f"engine.kv_cache_tokens={kv_tokens:,} is less than one sequence of {longest:,} tokens")
    _say_fit(plan, _rl_fits(config, learning, engine))
    return plan


def sft_plan(config: SFTConfig) -> Plan:
    check_directory(config, "sft")
    tasks = sft_with_room(config, config.task.build())
    model, tokenizer = sizes_and_tokenizer(config.model, tasks.train, config.chat)
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
    most_tokens = config.examples_per_step * max(lengths)
    trainer = trainer_memory(model, config.trainer, num_ranks, most_tokens)
    plan.sections[f"Memory of the trainer ({_ranks(num_ranks)})"] = _memory_rows(trainer)
    plan.problems += _too_long(max(lengths), model.max_position_embeddings, max(lengths), budget)
    on_cpu = config.trainer.device.startswith("cpu")
    alone = host_fit([trainer], [], ranks=1, engines=0, others=0)
    _say_fit(plan, [alone if on_cpu else gpu_fit(config.trainer.device, [trainer])])
    return plan


def _prompt_lengths(tokenizer: Tokenizer, task: Task) -> list[int]:
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
    itemsize = 2 if config.trainer.dtype == "bfloat16" else 4
    state = num_parameters(model) * (itemsize + (12 if itemsize == 2 else 8))
    when = f"every {config.checkpoint_every} steps" if config.checkpoint_every else "at the end"
    kept = f"{config.keep_checkpoints} kept" if config.keep_checkpoints else "all kept"
    return [
        ("steps", f"{config.steps:,}", f"{epochs:.3g} epochs of {num_problems:,} problems"),
        ("a checkpoint", size(state), f"weights and optimizer, {when}; {kept}"),
    ]


def _evaluation_row(config: RLConfig) -> Row:
    every = config.evaluate_every
    times = 1 + config.steps // every + (config.steps % every > 0) if every else 0
    evaluation = config.evaluation
    each = evaluation.num_problems * evaluation.samples_per_problem * (1 + len(config.evaluation_tasks))
    return ("evaluations", f"{times:,}", f"of at most {each:,} samples of {evaluation.max_tokens} tokens")


def _memory_rows(items: Sequence[Item]) -> list[Row]:
    total = sum(item.num_bytes for item in items)
    return [(item.name, size(item.num_bytes), item.how) for item in items] + [("in all", size(total), "")]


def _kv_rows(config: RLConfig, model: ModelConfig, prompts: Sequence[int]) -> list[Row]:
    """What the requests of a step would fill, if all ran at once to their longest; prompts of a group are shared."""
    rollout, engine = config.rollout, config.engine
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    own = _longest_sequence(config, prompts, model) - max(prompts)
    running = min(engine.max_running_requests, math.ceil(samples / config.cluster.num_engines))
    groups = math.ceil(running / rollout.samples_per_prompt)
    tokens = running * own + groups * max(prompts)
    wanted = tokens * kv_bytes_per_token(model, engine)
    rows = [("KV that a step can fill", size(wanted), f"{running} running x {own:,} tokens + {groups} prompts")]
    if engine.kv_cache_tokens is None and engine.device != "cpu":
        rows.insert(0, ("KV cache", "the rest", f"{engine.memory_fraction:.0%} of the free memory"))
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


def _rl_fits(config: RLConfig, learning: Sequence[Sequence[Item]], engine: Sequence[Item]) -> list[Fit]:
    """Of each place that holds a part of the run and could be looked at from here."""
    cluster, is_remote = config.cluster, config.cluster.kind == "ray"
    if config.trainer.device.startswith("cuda"):
        return [gpu_fit(config.trainer.device, learning if is_remote else [*learning, engine])]
    if cluster.address is not None:
        return []  # of machines that this one need not be like
    engines = cluster.num_engines * config.engine.tp_size if is_remote else 1
    return [host_fit(learning, engine, ranks=cluster.trainer_ranks, engines=engines, others=int(is_remote))]


def _say_fit(plan: Plan, fits: Sequence[Fit]) -> None:
    for fit in fits:
        available = "" if fit.available is None else f" of {size(fit.available)}"
        plan.sections[f"Does it fit in {fit.place}?"] = [
            (fit.verdict, size(fit.needed) + available, fit.how),
        ]
        if fit.problem is not None:
            plan.problems.append(fit.problem)


def _ranks(count: int) -> str:
    return "one process" if count == 1 else f"each of {count} ranks"
