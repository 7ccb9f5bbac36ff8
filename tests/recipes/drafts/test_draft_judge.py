"""Drafts that are judged on finished samples: what the engine's verification makes of the same drafts."""

import pytest
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.engine.steps.capture import CaptureConfig
from lockstep.recipes.drafts.draft import draft_sequence, new_draft
from lockstep.recipes.drafts.draft_judge import HeldOut, ngram_tokens_per_step, tokens_per_step
from lockstep.recipes.drafts.draft_texts import DraftText
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig
from lockstep.trainer_bridge.drafts.draft_trainer import DraftTrainer
from lockstep.trainer_bridge.drafts.unrolled_draft import UnrolledDraft

NUM_DRAFT_TOKENS = 3
TEMPERATURE = 0.3
PROMPTS = [[5 + i, 6, 7, 8] for i in range(6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1, vocab_size=64, eos_token_id=1)
    return str(path)


def generate(path, draft_model, capture=()):
    """(engine, its outputs and captured states, tokens per decoding step), each request speculating in every step."""
    engine = Engine(
        EngineConfig(
            model=path,
            max_model_len=64,
            enable_prefix_cache=False,
            draft_model=draft_model,
            num_draft_tokens=NUM_DRAFT_TOKENS,
            draft_max_requests=64,
            draft_min_accepted=0.0,
        )
    )
    buffer = engine.start_capture(CaptureConfig(capture or (0, 1, 2)))
    params = [
        SamplingParams(max_tokens=30, temperature=TEMPERATURE, seed=40 + i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    outputs = engine.generate(PROMPTS, params)
    by_tokens = {tuple(captured.token_ids): captured for captured in buffer.take()}
    samples = []
    for output, param in zip(outputs, params, strict=True):
        tokens = (*output.prompt_ids, *output.token_ids)
        mask = [index >= len(output.prompt_ids) for index in range(len(tokens))]
        sequence = draft_sequence(by_tokens[tokens], tokens, mask, engine.model_config.hidden_size)
        samples.append(HeldOut(sequence, len(output.prompt_ids), param.seed))
    drawn = sum(len(output.token_ids) - 1 for output in outputs)
    steps = drawn - sum(output.num_accepted_tokens for output in outputs)
    return engine, samples, drawn / steps


def test_a_draft_model_is_judged_as_it_is_verified(path, tmp_path):
    start = tmp_path / "start"
    engine = Engine(EngineConfig(model=path, max_model_len=64))
    save_draft(start, new_draft(engine, [DraftText(tuple(range(64)), 0)], 48, seed=3))
    engine, samples, _ = generate(path, str(start))
    # Trained a little, so that it gets some right.
    embedding, head = engine.model.embedding.word_embeddings.weight, engine.model.head_weight
    draft = load_draft(start, engine.model_config, embedding)
    config = DraftTrainerConfig(
        num_steps=NUM_DRAFT_TOKENS, learning_rate=1e-2, loss="acceptance", temperature=TEMPERATURE
    )
    trainer = DraftTrainer(config, draft, head)
    for _ in range(15):
        trainer.step([sample.sequence for sample in samples[:3]])
    save_draft(tmp_path / "trained", draft)

    _, samples, verified = generate(path, str(tmp_path / "trained"), draft.config.aux_layers)
    unrolled = UnrolledDraft(draft, head, NUM_DRAFT_TOKENS, TEMPERATURE, 8192)
    assert verified > 1.1
    assert tokens_per_step(unrolled, samples, NUM_DRAFT_TOKENS) == verified


def test_ngram_drafts_are_judged_as_they_are_verified(path):
    _, samples, verified = generate(path, "ngram")
    assert verified > 1.0
    assert ngram_tokens_per_step(samples, NUM_DRAFT_TOKENS) == verified
