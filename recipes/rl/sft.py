"""`lockstep sft`: supervised fine-tuning on the worked solutions of a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.inputs import starting_directory
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.plan import plan_sft
from lockstep.recipes.planning.room import sft_with_room
from lockstep.recipes.planning.start_checks import check_stage
from lockstep.recipes.rl.config import SFTConfig
from lockstep.recipes.training_run import TrainingRun
from lockstep.rollout.order import ProblemOrder
from lockstep.rollout.tasks import Problem, Task
from lockstep.rollout.tokenizer import encode_response, load_tokenizer, render_prompt
from lockstep.trainer_bridge import MegatronTrainer
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.packing import TrainSequence, pack

_LOG = logging.getLogger(__name__)


def run(config: SFTConfig) -> dict[str, Any]:
    """Trains until `config.steps` updates are made, and exports the model to the run's `model/`."""
    if config.dry_run:
        return plan_sft(config)
    config = resumed(config)
    check_stage(config)
    tasks = sft_with_room(config, config.task.build())
    with TrainingRun(config, "sft") as run:
        model = starting_directory(config.model, run.path / "new_model", tasks.train, config.seed)
        run.check_made("the new model", run.path / "new_model")
        tokenizer = load_tokenizer(model, config.chat)
        _LOG.info("loading the model %s into the trainer", model)
        trainer = MegatronTrainer(replace(config.trainer, model=str(model)))
        run.start(trainer)
        order = ProblemOrder(len(tasks.train), config.seed)
        for step in range(trainer.step_count + 1, config.steps + 1):
            started = time.perf_counter()
            examples = [order[step * config.examples_per_step + i] for i in range(config.examples_per_step)]
            sequences = [example_sequence(tokenizer, tasks.train, index) for index in examples]
            batches = pack(sequences, config.trainer.max_tokens_per_micro_batch, config.aggregation)
            with run.trace.span("train", step=step):
                stats = trainer.step(batches, sft_loss)
            seconds = time.perf_counter() - started
            run.record(step, {**stats, "tokens_per_s": stats["tokens"] / seconds, "time/train": seconds})
            run.checkpoint_if_due(step, trainer=trainer)
        return run.finish(trainer)


def example_sequence(tokenizer: Tokenizer, task: Task, index: int) -> TrainSequence:
    """Problem `index` with its worked solution, of which alone the loss is taken.

    Raises ValueError for a problem without a worked solution.
    """
    problem: Problem = task.problem(index)
    if problem.solution is None:
        raise ValueError(
            f"problem {problem.problem_id} of task {task.name!r} has no worked solution to learn from; "
            "local files name theirs with solution_column"
        )
    prompt = render_prompt(tokenizer, problem.messages)
    response: Sequence[int] = encode_response(tokenizer, problem.solution)
    return TrainSequence(token_ids=[*prompt, *response], loss_mask=[False] * len(prompt) + [True] * len(response))
