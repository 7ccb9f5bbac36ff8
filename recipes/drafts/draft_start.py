"""The draft directory that an online draft starts from, and the engine that serves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lockstep.engine import EngineConfig
from lockstep.engine.checkpoints.draft_checkpoint import save_draft
from lockstep.engine.models.config import load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft, initialize
from lockstep.engine.text.config import ChatConfig
from lockstep.engine.text.tokenizer import Tokenizer
from lockstep.recipes.drafts.config import USUAL_DRAFT_VOCAB
from lockstep.rollout.tasks import Task
from lockstep.rollout.tokenizer import encode_response, load_tokenizer, render_prompt
from lockstep.trainer_bridge.drafts.draft_trainer import frequent_tokens

if TYPE_CHECKING:
    from lockstep.recipes.drafts.config import DraftStageConfig

COUNTED_PROBLEMS = 1000


def with_draft(
    engine: EngineConfig, config: DraftStageConfig, directory: Path, task: Task, seed: int, chat: ChatConfig
) -> tuple[EngineConfig, DraftStageConfig]:
    """Both with the draft that the run starts from; without a draft stage, as they are.

    directory: of a new, untrained draft, made once. Its vocabulary are the tokens of the task's problems and worked
    solutions, the most frequent first.
    """
    if not config.is_on:
        return engine, config
    start = config.start or str(directory)
    if config.start is None and not directory.exists():
        _new_draft(engine.model, config.draft_vocab_size, directory, task, seed, chat)
    return replace(engine, draft_model=start, num_draft_tokens=config.num_draft_tokens), replace(config, start=start)


def _new_draft(
    model: str, draft_vocab_size: int | None, directory: Path, task: Task, seed: int, chat: ChatConfig
) -> None:
    target = load_model_config(model)
    size = min(draft_vocab_size or USUAL_DRAFT_VOCAB, target.vocab_size)
    # The target's, which no draft directory holds.
    embedding = torch.empty(target.vocab_size, target.hidden_size, dtype=torch.float32, device="cpu")
    draft = Eagle3Draft(Eagle3Config.of_target(target, size), embedding, torch.float32)
    initialize(draft, seed)
    draft.set_vocabulary(frequent_tokens(_counts(load_tokenizer(model, chat), task, target.vocab_size), size))
    save_draft(directory, draft, target=target)


def _counts(tokenizer: Tokenizer, task: Task, vocab_size: int) -> torch.Tensor:
    """How often the problems and worked solutions have each token: int64 [V]."""
    tokens: list[int] = []
    for index in range(min(len(task), COUNTED_PROBLEMS)):
        problem = task.problem(index)
        tokens += render_prompt(tokenizer, problem.messages)
        if problem.solution is not None:
            tokens += encode_response(tokenizer, problem.solution)
    return torch.bincount(torch.tensor(tokens, dtype=torch.int64, device="cpu"), minlength=vocab_size)
