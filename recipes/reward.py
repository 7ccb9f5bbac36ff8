"""`lockstep reward`: a Bradley-Terry reward model from preference pairs, judged by held-out pairs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lockstep.engine import Engine
from lockstep.engine.models.config import load_model_config
from lockstep.engine.pooling import scored_part
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.inputs import sizes_and_tokenizer, starting_directory
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.room import pairs_with_room, policy_with_room
from lockstep.recipes.planning.start_checks import check_stage
from lockstep.recipes.rl.config import RewardConfig
from lockstep.recipes.training_run import TrainingRun, is_due
from lockstep.rollout import hub
from lockstep.rollout.order import ProblemOrder
from lockstep.rollout.preferences import Preference, read_pairs, sample_pairs, write_pairs
from lockstep.rollout.rewards.models import conversation_ids
from lockstep.rollout.tasks import TaskSplits
from lockstep.rollout.tokenizer import load_tokenizer
from lockstep.trainer_bridge import MegatronTrainer
from lockstep.trainer_bridge.algorithms.preference import PreferencePair, bradley_terry_loss, pack_pairs

_LOG = logging.getLogger(__name__)


def run(config: RewardConfig) -> dict[str, Any]:
    """Trains until `config.steps` updates are made; `model/` of the run is then a ...ForSequenceClassification."""
    if config.dry_run:
        raise ValueError("lockstep reward has no plan to print: --dry-run is for rl and sft")
    config = resumed(config)
    check_stage(config)
    check_source(config)
    given = given_pairs(config) if config.train_files else None
    tasks = config.task.build() if given else policy_tasks(config)
    with TrainingRun(config, "reward") as run:
        model = str(starting_directory(config.model, run.path / "new_model", tasks.train, config.seed))
        run.check_made("the new model", run.path / "new_model")
        train, held_out = given or sampled_pairs(config, run, tasks, hub.model_directory(config.policy or model))
        tokenizer, pad_token_id = load_tokenizer(model, config.chat), load_model_config(model).pad_token_id
        train_tokens, held_out_tokens = (
            [tokenized(tokenizer, pair, pad_token_id) for pair in pairs] for pairs in (train, held_out)
        )
        for name, pairs in (("training", train_tokens), ("held-out", held_out_tokens)):
            check_lengths(name, pairs, config, load_model_config(model).max_position_embeddings)
        _LOG.info("loading the model %s", model)
        trainer = MegatronTrainer(replace(config.trainer, model=model, head="scalar"))
        run.start(trainer)
        order = ProblemOrder(len(train_tokens), config.seed)

        def evaluate_if_due(step: int) -> None:
            if is_due(step, config.evaluate_every, config.steps):
                scores = score_pairs(trainer, held_out_tokens)
                run.sinks.record(step, "eval", judge_scores(scores))
                run.sinks.record_samples(step, "eval", pair_rows(held_out, scores, config.wandb.sample_rows))

        if trainer.step_count == 0:
            evaluate_if_due(0)
        for step in range(trainer.step_count + 1, config.steps + 1):
            started = time.perf_counter()
            first = (step - 1) * config.pairs_per_step
            pairs = [train_tokens[order[first + i]] for i in range(config.pairs_per_step)]
            stats = trainer.step(pack_pairs(pairs, config.trainer.max_tokens_per_micro_batch), bradley_terry_loss)
            seconds = time.perf_counter() - started
            stats["train_accuracy"] = stats.pop("accuracy")
            run.record(step, {**stats, "tokens_per_s": stats["tokens"] / seconds, "time/train": seconds})
            evaluate_if_due(step)
            run.checkpoint_if_due(step, trainer=trainer)
        return run.finish(trainer)


def check_source(config: RewardConfig) -> None:
    """Raises ValueError where there is nothing that pairs could come from."""
    if config.train_files:
        return
    if config.held_out_files:
        raise ValueError("held_out_files are given without train_files: there is nothing to learn from")
    if config.policy is None and config.model.path is None:
        raise ValueError(
            "there are no pairs to learn from, and a model that is made from nothing has no right answers to make them "
            "of: give train_files=PAIRS.jsonl (lines of prompt, chosen, rejected), or a language model that can do the "
            "task as model.path=DIR or policy=DIR"
        )


def policy_tasks(config: RewardConfig) -> TaskSplits:
    """Of which a policy's answers become pairs. Raises ValueError for a problem whose pair could have no room."""
    tasks = config.task.build()
    model, tokenizer = sizes_and_tokenizer(config.model, tasks.train, config.chat)
    policy = model
    if config.policy is not None:
        path = hub.model_directory(config.policy, hub.TOKENIZER_AND_CONFIG)
        policy, tokenizer = load_model_config(path), load_tokenizer(path, config.chat)
    return policy_with_room(config, tasks, model, policy, tokenizer)


def given_pairs(config: RewardConfig) -> tuple[list[Preference], list[Preference]]:
    """The pairs of the files, to learn from and held out. Raises ValueError if either are none, or one has no room."""
    model, tokenizer = sizes_and_tokenizer(config.model, config.task.build().train, config.chat)
    budget = config.trainer.max_tokens_per_micro_batch

    def why_not(pair: Preference) -> str | None:
        lengths = [len(sequence) for sequence in tokenized(tokenizer, pair, model.pad_token_id)]
        if max(lengths) > model.max_position_embeddings:
            return f"has no room: it has {max(lengths):,} tokens, and the model takes {model.max_position_embeddings:,}"
        if sum(lengths) > budget:
            both = f"both responses have {sum(lengths):,} tokens"
            return f"has no room: {both}, and trainer.max_tokens_per_micro_batch allows {budget:,}"
        return None

    train = pairs_with_room(read_pairs(config.train_files), config.task, why_not)
    held_out = pairs_with_room(read_pairs(config.held_out_files), config.task, why_not)
    if not config.held_out_files:
        num_held_out = math.ceil(len(train) * config.held_out_fraction)
        train, held_out = train[: len(train) - num_held_out], train[len(train) - num_held_out :]
    return some_of_each(train, held_out)


def some_of_each(train: list[Preference], held_out: list[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Both. Raises ValueError if either are none."""
    if not (train and held_out):
        raise ValueError(f"{len(train)} pairs to learn from and {len(held_out)} held out: there must be some of each")
    return train, held_out


def sampled_pairs(
    config: RewardConfig, run: TrainingRun, tasks: TaskSplits, policy: str
) -> tuple[list[Preference], list[Preference]]:
    """A policy's right answers against its wrong ones; made once for a run, and found there when it is resumed."""
    files = {name: run.path / f"{name}_pairs.jsonl" for name in ("train", "held_out")}
    if not all(file.exists() for file in files.values()):
        tokenizer, sampling = load_tokenizer(policy, config.chat), config.sampling
        _LOG.info("sampling answers of the model %s, to make pairs", policy)
        engine = Engine(replace(config.engine, model=policy))
        try:
            for task, number, file in (  # the fewer first: they show as well whether there are pairs
                (tasks.held_out, sampling.held_out_problems, files["held_out"]),
                (tasks.train, sampling.train_problems, files["train"]),
            ):
                write_pairs(file, sample_pairs(engine, tokenizer, task, number, sampling, config.seed))
        finally:
            engine.shutdown()
    run.check_made("the policy's pairs", *files.values())
    return some_of_each(read_pairs([str(files["train"])]), read_pairs([str(files["held_out"])]))


def check_lengths(name: str, pairs: Sequence[PreferencePair], config: RewardConfig, longest: int) -> None:
    """Raises ValueError that names the first pair which the model, or a micro-batch, does not take."""
    budget = config.trainer.max_tokens_per_micro_batch
    for number, pair in enumerate(pairs, start=1):
        lengths = len(pair.chosen), len(pair.rejected)
        if max(lengths) > longest:
            raise ValueError(
                f"{name} pair {number} has conversations of {lengths[0]} and {lengths[1]} tokens, and the model takes "
                f"{longest}: leave it out or shorten it"
            )
        if sum(lengths) > budget:
            raise ValueError(
                f"{name} pair {number} has {sum(lengths)} tokens, and trainer.max_tokens_per_micro_batch={budget}: "
                "raise that, or leave the pair out"
            )


def tokenized(tokenizer: Tokenizer, pair: Preference, pad_token_id: int | None) -> PreferencePair:
    """Both conversations up to where the model's score will be read."""
    conversations = (conversation_ids(tokenizer, pair.messages, text) for text in (pair.chosen, pair.rejected))
    return PreferencePair(*(scored_part(token_ids, pad_token_id) for token_ids in conversations))


def score_pairs(trainer: MegatronTrainer, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
    """Of each pair's better response and of the other."""
    values = trainer.values([sequence for pair in pairs for sequence in pair])
    return [(chosen[-1], rejected[-1]) for chosen, rejected in zip(values[::2], values[1::2], strict=True)]


def judge_scores(scores: Sequence[tuple[float, float]]) -> dict[str, float]:
    """accuracy: pairs whose better response has the higher score; margin: the scores' mean difference."""
    margins = [chosen - rejected for chosen, rejected in scores]
    return {
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "margin": sum(margins) / len(margins),
    }


def pair_rows(pairs: Sequence[Preference], scores: Sequence[tuple[float, float]], number: int) -> list[dict[str, Any]]:
    """A table of the first pairs, for sinks."""
    return [
        {
            "data set": "held out",
            "prompt": "\n".join(message["content"] for message in pair.messages),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "chosen score": chosen,
            "rejected score": rejected,
            "correct": chosen > rejected,
        }
        for pair, (chosen, rejected) in zip(pairs[:number], scores[:number], strict=True)
    ]
