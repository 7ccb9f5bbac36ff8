"""RL with a draft that learns meanwhile: the same run, with drafts that are judged as the engine verifies them."""

import logging
from dataclasses import replace

import pytest
from short_runs import STEPS, Killed, short_config, without_times

from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.drafts.config import DraftStageConfig
from lockstep.recipes.drafts.draft_stage import DraftStage
from lockstep.recipes.rl import replay, rl, sft
from lockstep.recipes.runs.run_directory import read_metrics, rollout_steps
from lockstep.rollout.config import BufferConfig
from lockstep.trainer_bridge.drafts.config import DraftTrainerConfig

STAGE = DraftStageConfig(
    train_every=1,
    num_draft_tokens=3,
    sequences_per_update=4,
    held_out_every=3,
    trainer=DraftTrainerConfig(num_steps=3, learning_rate=3e-3, loss="acceptance"),
)


def config_of(runs_dir, stage=STAGE, **changes):
    config = short_config(runs_dir)
    engine = replace(config.engine, draft_max_requests=64, draft_min_accepted=0.0)
    changes = {"warmup": sft.SFTConfig(steps=0), "num_threads": 1, **changes}
    return replace(config, engine=engine, draft=stage, **changes)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    runs_dir = tmp_path_factory.mktemp("drafted")
    return runs_dir / "short", rl.run(config_of(runs_dir))


def rollouts(path):
    return [(path / f"rollouts/step_{step:06d}.jsonl").read_bytes() for step in rollout_steps(path)]


def draft_metrics(path):
    return [{k: v for k, v in r.items() if k.startswith("draft/")} for r in read_metrics(path) if r["stage"] == "rl"]


def steps_of(path):
    return [record for record in without_times(read_metrics(path)) if record["stage"] != "draft"]


def test_the_run_is_the_one_without_drafts(drafted, tmp_path):
    path, results = drafted
    plain = rl.run(config_of(tmp_path, DraftStageConfig()))
    assert results["weights_hash"] == plain["weights_hash"]
    assert rollouts(path) == rollouts(tmp_path / "short")
    metrics = draft_metrics(path)
    assert len(metrics) == STEPS
    assert all(m["draft/updates"] > 0 and m["draft/accepted_at_1"] >= 0 for m in metrics)
    assert any(m["draft/published"] for m in metrics)
    assert draft_metrics(tmp_path / "short") == [{}] * STEPS
    (timed,) = [record for record in read_metrics(path) if record["stage"] == "draft"]
    assert timed["draft/speed_up"] > 0
    assert (path / "draft" / "model.safetensors").exists()
    page = (path / "report.html").read_text()
    assert all(label in page for label in ("learned draft", "frozen draft", "n-gram", "token 3"))


def test_a_stored_run_replays_without_drafts(drafted):
    assert replay.run(replay.ReplayConfig(run=str(drafted[0])))["differences"] == 0


def test_a_killed_run_goes_on_with_the_drafts_of_its_checkpoint(drafted, tmp_path, monkeypatch):
    path, results = drafted
    after_rollout = DraftStage.after_rollout

    def die(self, groups, step):
        if step == 3:
            raise Killed
        return after_rollout(self, groups, step)

    with monkeypatch.context() as patch:
        patch.setattr(DraftStage, "after_rollout", die)
        with pytest.raises(Killed):
            rl.run(config_of(tmp_path))
    assert rl.run(config_of(tmp_path))["weights_hash"] == results["weights_hash"]
    assert steps_of(tmp_path / "short") == steps_of(path)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"cluster": ClusterConfig(kind="ray")}, "cluster.kind=ray"),
        ({"buffer": BufferConfig(max_staleness=1)}, "buffer.max_staleness=1"),
    ],
)
def test_a_run_that_cannot_train_a_draft_goes_without_and_says_so(changes, name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = rl.without_draft_where_none_can_learn(config_of(tmp_path, **changes))
    assert not config.draft.is_on
    assert f"does not go with {name}" in caplog.text


def test_the_vocabulary_of_a_new_draft_is_refused_beside_a_draft_to_start_from(tmp_path):
    config, start = short_config(tmp_path), DraftStageConfig(start="mine")
    with pytest.raises(ValueError, match=r"draft.start=mine has a vocabulary; draft.draft_vocab_size is that of a"):
        replace(config, draft=replace(start, draft_vocab_size=64))
    assert replace(config, draft=start).draft.start == "mine"
