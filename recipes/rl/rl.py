"""`lockstep rl`: reinforcement learning from verifiable rewards. The engine generates, Megatron-core learns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lockstep.recipes.cluster.local import LocalCluster
from lockstep.recipes.cluster.open_cluster import open_cluster
from lockstep.recipes.drafts.draft_stage import DraftStage, NoDraftStage, open_draft_stage
from lockstep.recipes.drafts.draft_start import with_draft
from lockstep.recipes.evaluation.evaluate import evaluate_tasks
from lockstep.recipes.inputs import starting_directory
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.plan import plan_rl
from lockstep.recipes.planning.room import rl_with_room
from lockstep.recipes.planning.start_checks import check_rl, check_teacher
from lockstep.recipes.rl import sft
from lockstep.recipes.rl.config import RLConfig
from lockstep.recipes.rl.learner import Learner
from lockstep.recipes.rl.step_clock import StepClock
from lockstep.recipes.runs.run_directory import read_rollouts, rollout_steps
from lockstep.recipes.training_run import TrainingRun, has_ended, is_due
from lockstep.rollout.answer_watch import AnswerWatch
from lockstep.rollout.buffer import RolloutBuffer
from lockstep.rollout.environments import SINGLE_TURN
from lockstep.rollout.environments.worker import build_worker
from lockstep.rollout.rewards import CORRECT, check_reward
from lockstep.rollout.sample import Sample
from lockstep.rollout.tasks import Task, TaskSplits
from lockstep.rollout.tokenizer import load_tokenizer
from lockstep.rollout.worker import RolloutWorker

_LOG = logging.getLogger(__name__)

WARMUP = "sft"  # the folder of the warm-up's run in the run directory


def run(config: RLConfig) -> dict[str, Any]:
    """Trains until `config.steps` updates are made; see `train` for a step."""
    if config.dry_run:
        return plan_rl(config)
    config = resumed(config)
    check_reward(config.reward)
    check_rl(config)
    tasks, further = tasks_of(config)
    with TrainingRun(config, "rl") as run:
        config = without_draft_where_none_can_learn(config)
        start = starting_model(config, tasks)
        run.check_made("the new model", run.path / "new_model")
        if start.is_relative_to(run.path / WARMUP):
            run.check_made("the warm-up's model", start)
        check_teacher(config, start)
        start = str(start)
        trainer, engine = replace(config.trainer, model=start), replace(config.engine, model=start)
        engine, draft_config = with_draft(
            engine, config.draft, run.path / "new_draft", tasks.train, config.seed, config.chat
        )
        run.check_made("the new draft", run.path / "new_draft")
        with open_cluster(config.cluster, trainer, engine, config.seed, config.num_threads) as cluster:
            run.start(cluster.trainer)
            if version := config.steps_made(cluster.trainer.step_count):
                cluster.publish(version)
            with Learner(config, cluster, start) as learner:
                draft = open_draft_stage(draft_config, cluster.engine, config.rollout.temperature)
                run.restore(learner=learner, draft=draft)
                train(config, run, tasks, {"": tasks.held_out, **further}, cluster, learner, draft)
                if timed := draft.finish(run.path / "draft", cluster.trainer, last_samples(run.path)):
                    run.sinks.record(config.steps, "draft", timed)
            warmup = run.path / WARMUP
            return run.finish(cluster.trainer, earlier_runs=[warmup] if warmup.exists() else [])


def without_draft_where_none_can_learn(config: RLConfig) -> RLConfig:
    """Drafts change no result, so a run that cannot train one goes without, and says so."""
    reasons = {
        f"cluster.kind={config.cluster.kind}": config.cluster.kind != "local",
        f"environment.kind={config.environment.kind}": config.environment.kind != SINGLE_TURN,
        f"buffer.max_staleness={config.buffer.max_staleness}": config.buffer.max_staleness > 0,
    }
    reason = next((name for name, is_set in reasons.items() if is_set), None)
    if reason is None or not config.draft.is_on:
        return config
    _LOG.info("no draft is trained: that does not go with %s", reason)
    return replace(config, draft=replace(config.draft, train_every=0))


def tasks_of(config: RLConfig) -> tuple[TaskSplits, dict[str, Task]]:
    """The run's task, and the held-out problems of its further evaluations: those with room, see planning/room.py."""
    further = {name: task.build().held_out for name, task in config.evaluation_tasks.items()}
    return rl_with_room(config, config.task.build(), further)


def starting_model(config: RLConfig, tasks: TaskSplits) -> Path:
    """The model that RL starts from: the warm-up's result (made now if it is not there yet), or the given one."""
    new_model = config.directory / "new_model"
    if config.warmup.steps == 0:
        return starting_directory(config.model, new_model, tasks.train, config.seed)
    warmup = replace(
        config.warmup,
        name=WARMUP,
        runs_dir=str(config.directory),
        model=config.model,
        task=config.task,
        chat=config.chat,
        seed=config.seed,
        num_threads=config.num_threads,
        sinks=config.sinks,
        wandb=replace(config.wandb, id=None, name=f"{config.wandb.name or config.directory.name} warm-up"),
    )
    if not has_ended(warmup):
        sft.run(warmup)
    return warmup.directory / "model"


def rollout_worker(config: RLConfig, cluster: LocalCluster, task: Task) -> RolloutWorker:
    """What draws and scores a run's samples, and in a replay draws them again."""
    tokenizer = load_tokenizer(cluster.engine.config.model, config.chat)
    reward, correct = cluster.rewards.build(config.reward, task), cluster.rewards.build(CORRECT, task)
    return build_worker(
        cluster.engine, tokenizer, task, reward, config.rollout, config.seed, config.environment, correct
    )


def last_samples(path: Path) -> list[Sample]:
    return [Sample.from_record(record) for record in read_rollouts(path, rollout_steps(path)[-1])]


def train(
    config: RLConfig,
    run: TrainingRun,
    tasks: TaskSplits,
    held_out: Mapping[str, Task],
    cluster: LocalCluster,
    learner: Learner,
    draft: DraftStage | NoDraftStage,
) -> None:
    """The loop. Weight version `s` is what the engine serves after step `s`; step `s` learns from the versions
    `s - 1 - max_staleness` to `s - 1`, and while it is made the engine generates for later steps with version `s - 1`.
    """
    trainer, engine = cluster.trainer, cluster.engine
    worker = rollout_worker(config, cluster, tasks.train)
    buffer = RolloutBuffer(worker, config.buffer, learner.algorithm.keep_group)
    run.restore(buffer=buffer)
    watch = AnswerWatch()

    def evaluate_if_due(step: int) -> None:
        if is_due(step, config.evaluate_every, config.steps):
            with run.trace.span("evaluation", step=step):
                results = evaluate_tasks(
                    engine,
                    worker.tokenizer,
                    held_out,
                    config.reward,
                    cluster.rewards,
                    config.evaluation,
                    config.seed,
                    config.environment,
                )
            run.record_evaluation(step, results, worker.tokenizer.decode)

    steps_made = config.steps_made(trainer.step_count)
    if steps_made == 0:
        evaluate_if_due(0)
    for step in range(steps_made + 1, config.steps + 1):
        clock = StepClock(run.trace, step)
        draft.before_rollout()
        groups = clock.rollout(partial(buffer.take, step))
        failed = worker.failures.take()  # ends the run, before it learns from them, where all have failed alike
        drafted = clock.draft(partial(draft.after_rollout, groups, step))
        stats = clock.side_by_side(partial(learner.step, groups), buffer.advance, overlap=cluster.overlaps)
        clock.publish(partial(cluster.publish, version=step))
        buffer.new_version()
        run.directory.write_rollouts(step, learner.learned)
        metrics = step_metrics(step, groups, stats, buffer, clock)
        unanswered = watch.step([sample for group in groups for sample in group])
        run.record(step, metrics | {"verifier_failures": failed, "unanswered": unanswered} | drafted)
        evaluate_if_due(step)
        run.checkpoint_if_due(step, trainer=trainer, learner=learner, buffer=buffer, draft=draft)


def step_metrics(
    step: int, groups: Sequence[Sequence[Sample]], stats: Mapping[str, float], buffer: RolloutBuffer, clock: StepClock
) -> dict[str, float]:
    """What a step reports.

    logprob_diff_max: the largest |trainer - engine| over the tokens that the current weights drew; policy_shift_max:
    over all, also those of older versions, from which the policy has moved. staleness: versions that a token is behind.
    """
    samples = [sample for group in groups for sample in group]
    generated = sum(sum(sample.written) for sample in samples)
    ages = [step - 1 - version for sample in samples for version in sample.weight_versions]
    return {
        "reward": sum(sample.reward for sample in samples) / len(samples),
        "train_accuracy": sum(sample.correct for sample in samples) / len(samples),
        "response_length": generated / len(samples),
        **(_episode_metrics(samples, buffer) if samples[0].response_mask is not None else {}),
        "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "mixed_groups": sum(len({sample.reward for sample in group}) > 1 for group in groups) / len(groups),
        "staleness": sum(ages) / len(ages),
        "staleness_max": max(ages),
        "dropped_groups": buffer.num_dropped,
        "too_old_groups": buffer.num_too_old,
        **stats,
        "tokens_per_s": buffer.num_tokens / clock.rollout_s,
        **{f"time/{name}": seconds for name, seconds in clock.times().items()},
    }


def _episode_metrics(samples: Sequence[Sample], buffer: RolloutBuffer) -> dict[str, float]:
    """environment_failures: of all episodes since the step before, retries and dropped groups included."""
    return {
        "turns": sum(len(sample.turn_rewards) for sample in samples) / len(samples),
        "environment_failures": buffer.num_failures,
    }
