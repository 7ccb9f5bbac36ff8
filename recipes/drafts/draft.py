"""`lockstep draft`: trains an EAGLE-3 draft for a model, offline, on the rollouts of a run or on a file of texts."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lockstep.engine import Engine, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.checkpoints.draft_config import choose_engine, load_draft_config
from lockstep.engine.models.config import ModelConfig, load_model_config
from lockstep.engine.models.eagle3 import Eagle3Config, Eagle3Draft, initialize
from lockstep.engine.speculation.config import MAX_DRAFT_TOKENS
from lockstep.engine.steps.capture import Capture, CaptureConfig, CapturedSequence
from lockstep.engine.text.detokenizer import decode_text
from lockstep.engine.text.end_of_turn import stop_token_ids
from lockstep.recipes.drafts.config import USUAL_DRAFT_VOCAB, DraftConfig
from lockstep.recipes.drafts.draft_texts import DraftText, read_texts
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.start_checks import check_stage
from lockstep.recipes.runs.report import write_report
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.recipes.training_run import TrainingRun, is_due
from lockstep.rollout import hub
from lockstep.rollout.order import ProblemOrder
from lockstep.trainer_bridge.drafts.draft_batch import DraftSequence
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer, frequent_tokens

_LOG = logging.getLogger(__name__)


def run(config: DraftConfig) -> dict[str, Any]:
    """Trains until `config.steps` updates are made, exports the draft to `draft` in the run directory, and tries it."""
    config = resumed(config)
    check_stage(config)
    config = replace(config, engine=replace(config.engine, model=hub.pinned(config.engine.model)))
    model = hub.model_directory(config.engine.model)
    held_out, texts = checked_texts(config, model)
    with TrainingRun(config, "draft") as run:
        _LOG.info("loading the model %s", config.engine.model)
        config = replace(config, engine=replace(config.engine, model=model))
        engine = Engine(config.engine)
        draft = _starting_draft(config, engine, texts)
        capture = engine.start_capture(CaptureConfig(draft.config.aux_layers, memory_bytes=2**62))
        trainer = DraftTrainer(config.trainer, draft, engine.model.head_weight)
        run.start(trainer)
        held_out_sequences = with_states(engine, capture, held_out)
        train(config, run, engine, capture, trainer, texts, held_out, held_out_sequences)
        export, temperature, served_by = _export(run, trainer, held_out_sequences, engine.model_config)
        engine.shutdown()
        run.sinks.record(config.steps, "draft_verified", verified_acceptance(config, export, held_out))
        return _finish(run, trainer, export, temperature, served_by)


def train(
    config: DraftConfig,
    run: TrainingRun,
    engine: Engine,
    capture: Capture,
    trainer: DraftTrainer,
    texts: Sequence[DraftText],
    held_out: Sequence[DraftText],
    held_out_sequences: Sequence[DraftSequence],
) -> None:
    """The loop. Step s learns from the texts whose turn it is; their states are computed for it and then dropped."""

    def evaluate_if_due(step: int) -> None:
        if is_due(step, config.evaluate_every, config.steps):
            run.sinks.record(step, "draft_eval", trainer.unrolled.evaluate(held_out_sequences))
            if config.sinks:
                rows = text_rows(engine, trainer, held_out, held_out_sequences, config.wandb.sample_rows)
                run.sinks.record_samples(step, "draft_eval", rows)

    order = ProblemOrder(len(texts), config.seed)
    if trainer.step_count == 0:
        evaluate_if_due(0)
    for step in range(trainer.step_count + 1, config.steps + 1):
        started = time.perf_counter()
        first = (step - 1) * config.sequences_per_step
        chosen = [texts[order[place]] for place in range(first, first + config.sequences_per_step)]
        sequences = with_states(engine, capture, chosen)
        prefilled = time.perf_counter()
        stats = trainer.step(sequences)
        ended = time.perf_counter()
        stats["tokens_per_s"] = stats["tokens"] / (ended - prefilled)
        run.record(step, {**stats, "time/states": prefilled - started, "time/train": ended - prefilled})
        evaluate_if_due(step)
        run.checkpoint_if_due(step, trainer=trainer)


def text_rows(
    engine: Engine,
    trainer: DraftTrainer,
    texts: Sequence[DraftText],
    sequences: Sequence[DraftSequence],
    number: int,
) -> list[dict[str, Any]]:
    """A table of the first texts, each with what is expected of the draft on it, for sinks."""
    decode = str if engine.tokenizer is None else partial(decode_text, engine.tokenizer, skip_special_tokens=False)
    return [
        {
            "data set": "held out",
            "prompt": decode(list(text.token_ids[: text.num_prompt])),
            "response": decode(list(text.token_ids[text.num_prompt :])),
            **trainer.unrolled.evaluate([sequence]),
        }
        for text, sequence in zip(texts[:number], sequences[:number], strict=True)
    ]


def with_states(engine: Engine, capture: Capture, texts: Sequence[DraftText]) -> list[DraftSequence]:
    """The texts with the target's states, from one prefill of all but their last tokens."""
    prompts = [list(text.token_ids[:-1]) for text in texts]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0))
    # They come in the order in which they ended; equal prompts have equal states.
    by_prompt = {tuple(captured.token_ids[: captured.num_prompt]): captured for captured in capture.take()}
    return [
        draft_sequence(by_prompt[text.token_ids[:-1]], text.token_ids, text.loss_mask, engine.model_config.hidden_size)
        for text in texts
    ]


def draft_sequence(
    captured: CapturedSequence, token_ids: Sequence[int], loss_mask: Sequence[bool], hidden_size: int
) -> DraftSequence:
    """What a draft learns from captured states: the last hidden_size columns are the last layer's."""
    states = captured.states[: len(token_ids) - 1]
    return DraftSequence(token_ids, loss_mask, states[:, :-hidden_size], states[:, -hidden_size:])


def new_draft(
    engine: Engine, texts: Sequence[DraftText], draft_vocab_size: int | None, seed: int, **options: Any
) -> Eagle3Draft:
    """An untrained draft for the engine's model, in its dtype, with the tokens that the texts use most."""
    target = engine.model_config
    size = min(draft_vocab_size or USUAL_DRAFT_VOCAB, target.vocab_size)
    embedding = engine.model.embedding.word_embeddings.weight
    draft = Eagle3Draft(Eagle3Config.of_target(target, size, **options), embedding, embedding.dtype)
    initialize(draft, seed)
    learned = [token for text in texts for token in text.token_ids[text.num_prompt :]]
    counts = torch.bincount(torch.tensor(learned, dtype=torch.int64, device="cpu"), minlength=target.vocab_size)
    draft.set_vocabulary(frequent_tokens(counts, size))
    return draft


def checked_texts(config: DraftConfig, model: str) -> tuple[list[DraftText], list[DraftText]]:
    """(held out, to train on). Looks at all that can be refused before the model of that directory is loaded.

    Raises ValueError for texts that are none, and for a draft that cannot start from, or be exported to, what is asked.
    """
    target = load_model_config(model)
    max_tokens = min(config.max_tokens, config.engine.max_model_len or target.max_position_embeddings)
    texts = read_texts(config.rollouts, config.texts, model, max_tokens)
    if config.start is None:
        draft = Eagle3Config.of_target(target, target.vocab_size)
    elif config.draft_vocab_size is not None:
        raise ValueError(f"draft: start={config.start} has a vocabulary; draft_vocab_size is that of a new draft")
    elif config.norm_aux or config.norm_output:
        raise ValueError(f"draft: start={config.start} has its norms; norm_aux and norm_output are of a new draft")
    else:
        draft = load_draft_config(config.start, target, config.engine.draft_layer_ids)
    choose_engine(config.export_for, draft.aux_layers, target)
    return _split(texts, config)


def _starting_draft(config: DraftConfig, engine: Engine, texts: Sequence[DraftText]) -> Eagle3Draft:
    if config.start is None:
        options = {"norm_aux": config.norm_aux, "norm_output": config.norm_output}
        return new_draft(engine, texts, config.draft_vocab_size, config.seed, **options)
    embedding = engine.model.embedding.word_embeddings.weight
    options = {"head_weight": engine.model.head_weight, "numbers_of": config.engine.draft_layer_ids}
    return load_draft(config.start, engine.model_config, embedding, embedding.dtype, **options)


def _split(texts: list[DraftText], config: DraftConfig) -> tuple[list[DraftText], list[DraftText]]:
    """(held out, to train on), the same for the same texts, seed and number."""
    order = ProblemOrder(len(texts), config.seed)
    shuffled = [texts[order[place]] for place in range(len(texts))]
    num_held_out = min(config.held_out, len(texts) // 2)
    return shuffled[:num_held_out], shuffled[num_held_out:]


def verified_acceptance(config: DraftConfig, export: Path, held_out: Sequence[DraftText]) -> dict[str, float]:
    """What speculation makes of the draft: the held-out prompts (the first half of a text without one) are completed
    with it. Tokens per verify step, and the share of the drafts at each place that was accepted."""
    num_draft_tokens = min(MAX_DRAFT_TOKENS, config.trainer.num_steps)
    always = {"draft_max_requests": config.engine.max_running_requests, "draft_min_accepted": 0.0}
    settings = {"draft_model": str(export), "num_draft_tokens": num_draft_tokens, **always}
    engine = Engine(replace(config.engine, **settings))
    prompts = [list(text.token_ids[: text.num_prompt or len(text.token_ids) // 2]) for text in held_out]
    lengths = [len(text.token_ids) - len(prompt) for text, prompt in zip(held_out, prompts, strict=True)]
    ends = stop_token_ids(engine.tokenizer) if engine.tokenizer is not None else ()
    sampling = SamplingParams(temperature=config.trainer.temperature, stop_token_ids=ends)
    params = [replace(sampling, max_tokens=length, seed=config.seed + index) for index, length in enumerate(lengths)]
    engine.generate(prompts, params)
    stats = engine.stats()
    engine.shutdown()
    places = range(1, num_draft_tokens + 1)
    shares = {n: stats[f"accepted_at_{n}"] / stats[f"drafted_at_{n}"] for n in places if stats[f"drafted_at_{n}"]}
    return {
        "verified_tokens_per_step": stats["tokens_per_verify_step"],
        **{f"verified_acceptance_{n - 1}": share for n, share in shares.items()},
    }


def _export(
    run: TrainingRun, trainer: DraftTrainer, held_out: Sequence[DraftSequence], target: ModelConfig
) -> tuple[Path, float, str]:
    """Writes the draft at its best temperature. Returns that too, and the engine that the directory is for."""
    temperature = trainer.unrolled.tune_temperature(held_out)
    export = run.path / "draft"
    shutil.rmtree(export, ignore_errors=True)
    served_by = save_draft(export, trainer.draft, temperature, export_for=run.config.export_for, target=target)
    return export, temperature, served_by


def _finish(
    run: TrainingRun, trainer: DraftTrainer, export: Path, temperature: float, served_by: str
) -> dict[str, Any]:
    """Records the weights' hash, writes the report, and prints the summary, which it returns."""
    digest = trainer.weights_hash()
    run.directory.write_weights_hash(digest)
    records = read_metrics(run.path)
    evaluations = [record["tokens_per_step"] for record in records if record["stage"] == "draft_eval"]
    results = {
        "tokens_per_step_before": evaluations[0],
        "tokens_per_step_after": evaluations[-1],
        "verified_tokens_per_step": records[-1]["verified_tokens_per_step"],
        "draft_temperature": temperature,
        "weights_hash": digest,
        "draft": str(export),
        "draft_layer_ids_for": served_by,
        "report": str(write_report(run.path)),
    }
    run.view.summary(results)
    return results
