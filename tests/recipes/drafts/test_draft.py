"""The draft stage end to end on a tiny target: it learns, exports, and resumes to the bit; and its online form."""

import json
from dataclasses import replace

import pytest
import torch
from models import make_hf_model

from lockstep.engine import Engine, EngineConfig, SamplingParams
from lockstep.engine.checkpoints.draft_checkpoint import load_draft, save_draft
from lockstep.recipes.drafts import draft
from lockstep.recipes.drafts.config import DraftConfig, DraftStageConfig
from lockstep.recipes.drafts.draft import new_draft
from lockstep.recipes.drafts.draft_stage import DraftStage
from lockstep.recipes.drafts.draft_texts import DraftText
from lockstep.recipes.runs.run_directory import read_metrics
from lockstep.recipes.runs.sinks import Sinks
from lockstep.rollout.config import TokenizerConfig
from lockstep.rollout.sample import Sample
from lockstep.rollout.tokenizer import build_tokenizer
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig

TRAINER = DraftTrainerConfig(num_steps=3, learning_rate=3e-3, loss="acceptance")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_hf_model(path, "qwen3", seed=1, vocab_size=320, eos_token_id=1)
    build_tokenizer(["the quick brown fox"] * 3, TokenizerConfig(vocab_size=320)).save_pretrained(path)
    return str(path)


def text_file(tmp_path, path):
    file = tmp_path / "texts.txt"
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and"]
    file.write_text("\n".join(" ".join(words[(i + j) % 10] for j in range(6)) for i in range(12)))
    return str(file)


def make_config(tmp_path, path, **changes):
    config = DraftConfig(
        engine=EngineConfig(model=path, max_model_len=64),
        runs_dir=str(tmp_path / "runs"),
        num_threads=1,
        texts=text_file(tmp_path, path),
        draft_vocab_size=100,
        trainer=TRAINER,
        steps=6,
        sequences_per_step=4,
        held_out=3,
        evaluate_every=3,
        checkpoint_every=2,
    )
    return replace(config, **changes)


def test_a_run_learns_exports_and_resumes_to_the_bit(tmp_path, path, monkeypatch):
    tables = []
    with monkeypatch.context() as patch:
        patch.setattr(Sinks, "record_samples", lambda self, *table: tables.append(table))
        result = draft.run(make_config(tmp_path, path, sinks=("tensorboard",)))
    assert [(step, stage, len(rows)) for step, stage, rows in tables] == [(n, "draft_eval", 3) for n in (0, 3, 6)]
    row = tables[-1][2][0]
    assert (row["data set"], row["prompt"]) == ("held out", "")
    assert set(row["response"].split()) <= {"the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and"}
    assert 1.0 <= row["tokens_per_step"] <= 4.0
    assert result["tokens_per_step_after"] > result["tokens_per_step_before"]
    assert 1.0 <= result["verified_tokens_per_step"] <= 4.0
    engine = Engine(EngineConfig(model=path))
    exported = load_draft(result["draft"], engine.model_config, engine.model.embedding.word_embeddings.weight)
    assert exported.config.draft_vocab_size == 100
    records = read_metrics(tmp_path / "runs" / "draft")
    assert [record["step"] for record in records if record["stage"] == "draft_eval"] == [0, 3, 6]
    assert {"loss", "grad_norm", "tokens_per_s"} <= next(r for r in records if r["stage"] == "draft").keys()

    draft.run(make_config(tmp_path, path, name="stopped", steps=4))
    resumed = draft.run(make_config(tmp_path, path, name="stopped"))
    assert resumed["weights_hash"] == result["weights_hash"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": None}, "give either rollouts=RUN_DIRECTORY or texts=FILE"),
        ({"texts": "bad.jsonl"}, r'row bad/0 .*line 1\) has neither a column "text"'),
        ({"texts": "empty.txt"}, "empty.txt has 0 texts to learn from"),
        ({"texts": "absent.txt"}, "no file absent.txt"),
        ({"texts": None, "rollouts": "no_run"}, "no_run has 0 texts to learn from"),
        ({"start": "no_draft", "draft_vocab_size": None}, "no_draft"),
        ({"start": "no_draft"}, "draft_vocab_size is that of a new draft"),
    ],
)
def test_what_does_not_serve_is_refused_before_the_model_is_loaded(changes, message, tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draft, "Engine", None)
    monkeypatch.setattr(draft, "TrainingRun", None)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": 1}) + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        draft.run(make_config(tmp_path, path, **changes))


def rollout(engine, step):
    prompts = [[5 + i, 6, 7] for i in range(4) for _ in range(4)]
    params = [SamplingParams(max_tokens=12, seed=100 * step + i, ignore_eos=True) for i in range(16)]
    samples = [
        Sample(
            problem_id="p",
            step=step,
            prompt_index=0,
            sample_index=0,
            seed=param.seed,
            prompt_ids=tuple(output.prompt_ids),
            response_ids=tuple(output.token_ids),
            logprobs=tuple(output.logprobs),
            weight_versions=(),
            finish_reason="length",
            text="",
            reward=0.0,
            correct=False,
        )
        for output, param in zip(engine.generate(prompts, params), params, strict=True)
    ]
    return [samples[at : at + 4] for at in range(0, 16, 4)]


def make_stage(tmp_path, path, published, **changes):
    start = tmp_path / "start"
    config = EngineConfig(model=path, max_model_len=64)
    if not start.exists():
        save_draft(start, new_draft(Engine(config), [DraftText(tuple(range(320)), 0)], 200, seed=3))
    always = {"draft_max_requests": 64, "draft_min_accepted": 0.0}
    engine = Engine(replace(config, draft_model=str(start), num_draft_tokens=3, **always))
    config = DraftStageConfig(
        train_every=1,
        start=str(start),
        num_draft_tokens=3,
        sequences_per_update=4,
        passes=6,
        held_out_every=3,
        trainer=TRAINER,
    )

    def publish(named, version):
        published.append((version, {name: weight.clone() for name, weight in named}))

    return engine, DraftStage(replace(config, **changes), engine, publish)


def test_online_it_learns_from_rollouts_publishes_what_is_no_worse_and_resumes(tmp_path, path):
    published = []
    engine, stage = make_stage(tmp_path, path, published)
    metrics = []
    for step in (1, 2):
        stage.before_rollout()
        groups = rollout(engine, step)
        engine.generate([[9, 9]], SamplingParams(max_tokens=5))  # not of the groups
        metrics.append(stage.after_rollout(groups, step))
    stage.save(tmp_path / "saved")
    stage.before_rollout()
    metrics.append(stage.after_rollout(rollout(engine, 3), 3))
    assert all(m["draft/updates"] > 0 for m in metrics)
    for m in metrics:
        better = m["draft/held_out_learned"] >= m["draft/held_out_served"]
        assert bool(m["draft/published"]) == better
    assert any(m["draft/published"] for m in metrics[:2])
    versions = [step for step, m in zip((1, 2, 3), metrics, strict=True) if m["draft/published"]]
    assert [version for version, _ in published] == versions
    assert all(torch.equal(published[-1][1][name], p) for name, p in stage.served.named_parameters())

    again_published = []
    engine, again = make_stage(tmp_path, path, again_published)
    again.load(tmp_path / "saved")
    assert again_published[0][0] == again.version
    again.before_rollout()
    assert again.after_rollout(rollout(engine, 3), 3) == metrics[2]


def test_a_draft_that_got_worse_is_not_published(tmp_path, path):
    published = []
    engine, stage = make_stage(tmp_path, path, published)
    learned = [stage.after_rollout(rollout(engine, step), step)["draft/held_out_learned"] for step in (1, 2, 3)]
    assert learned[-1] > 1.0
    step_of_trainer = stage.trainer.step

    def spoil(sequences):
        stats = step_of_trainer(sequences)
        with torch.no_grad():
            stage.draft.output_layer.weight.mul_(-20.0)
        return stats

    stage.trainer.step = spoil
    num_published = len(published)
    metrics = stage.after_rollout(rollout(engine, 4), 4)
    assert metrics["draft/held_out_learned"] < learned[-1]
    assert metrics["draft/published"] == 0.0
    assert len(published) == num_published
    assert metrics["draft/version"] == published[-1][0]
