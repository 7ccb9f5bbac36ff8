"""The files of a checkpoint: no pickle is read, damage is named, and what earlier versions saved is rewritten."""

import json
import shutil

import pytest
import torch
from models import make_hf_model
from pickles import payload, write_old_checkpoint
from safetensors.torch import load_file, save_file

from lockstep.engine.checkpoints.checkpoint import CheckpointError
from lockstep.engine.models.sharding import ParameterShard, Piece
from lockstep.recipes.conversion.config import ConvertConfig
from lockstep.recipes.conversion.convert import run as convert
from lockstep.recipes.runs import content_hashes
from lockstep.trainer_bridge import MegatronTrainer, TrainerConfig
from lockstep.trainer_bridge.algorithms.losses import sft_loss
from lockstep.trainer_bridge.megatron.checkpoint import CheckpointFiles, write_common, write_rank
from lockstep.trainer_bridge.megatron.pickled_checkpoint import rewrite
from lockstep.trainer_bridge.packing import TrainSequence, pack


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer that has made a step, its model's folder, and its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    make_hf_model(folder / "model", "qwen3", seed=1)
    trainer = MegatronTrainer(TrainerConfig(model=str(folder / "model"), learning_rate=1e-2))
    trainer.step(pack([TrainSequence(list(range(20)), [False] * 2 + [True] * 18)], 64), sft_loss)
    trainer.save(folder / "checkpoint", metadata={"prompts": [1, 2]})
    return trainer, folder


@pytest.fixture(scope="module")
def old(saved):
    """The same checkpoint as an earlier version wrote it."""
    _, folder = saved
    with CheckpointFiles(folder / "checkpoint") as files:
        tensors = {name: files.read_whole(name) for name in sorted(files.names())}
        write_old_checkpoint(folder / "old", files.common, tensors, num_layers=3)
    return folder / "old"


def test_a_checkpoint_holds_json_and_safetensors_alone(saved):
    _, folder = saved
    names = sorted(path.name for path in (folder / "checkpoint").iterdir())
    assert names == ["checkpoint.json", "rank_00000.json", "rank_00000_00000.safetensors"]
    assert all(json.loads((folder / "checkpoint" / name).read_text()) for name in names[:2])
    assert load_file(folder / "checkpoint" / names[2])["weight/decoder.final_layernorm.weight"].shape == (64,)


def test_parts_of_two_ranks_are_read_by_one_and_by_three(tmp_path):
    """A [6, 4] tensor in two column halves, read whole and in rows; several files per rank."""
    whole = torch.arange(24.0).view(6, 4)
    for rank in range(2):
        box = ((0, 6), (2 * rank, 2 * rank + 2))
        shard = ParameterShard("weight/a", (6, 4), (6, 2), (Piece(box, ((0, 6), (0, 2))),))
        other = ParameterShard("weight/b", (2,), (2,), (Piece(((0, 2),), ((0, 2),)),))
        held = [(shard, whole[:, 2 * rank : 2 * rank + 2]), (other, torch.ones(2) if rank == 1 else None)]
        write_rank(tmp_path, rank, held, max_file_bytes=50)
    write_common(tmp_path, 2, {})
    assert len(list(tmp_path.glob("rank_00001_*.safetensors"))) == 2
    with CheckpointFiles(tmp_path) as files:
        assert torch.equal(files.read_whole("weight/a"), whole)
        for first in range(0, 6, 2):
            piece = Piece(((first, first + 2), (0, 4)), ((0, 2), (0, 4)))
            part = files.read(ParameterShard("weight/a", (6, 4), (2, 4), (piece,)))
            assert torch.equal(part, whole[first : first + 2])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_entry(path, name, **changes):
    contents = json.loads(path.read_text())
    contents["tensors"][name].update(changes)
    path.write_text(json.dumps(contents))


NORM = "weight/decoder.final_layernorm.weight"
INDEX, TENSORS = "rank_00000.json", "rank_00000_00000.safetensors"
DAMAGE = {
    "no index": (lambda p: (p / INDEX).unlink(), "rank_00000.json is missing"),
    "no tensors": (lambda p: (p / TENSORS).unlink(), "safetensors is missing"),
    "garbage": (lambda p: (p / "checkpoint.json").write_text("{"), "not valid JSON"),
    "a list": (lambda p: (p / "checkpoint.json").write_text("[]"), "not a JSON object"),
    "deep": (lambda p: (p / INDEX).write_text('{"a":' * 10**5), "nested too deeply"),
    "another version": (lambda p: edit_json(p / "checkpoint.json", version=2), "version 1"),
    "ranks": (lambda p: edit_json(p / "checkpoint.json", num_ranks=10**9), "num_ranks"),
    "one rank more": (lambda p: edit_json(p / "checkpoint.json", num_ranks=2), "rank_00001.json is missing"),
    "truncated": (lambda p: (p / TENSORS).write_bytes((p / TENSORS).read_bytes()[:-1]), "damaged"),
    "a path": (lambda p: edit_entry(p / INDEX, NORM, file="../x.safetensors"), "is not a tensor's entry"),
    "a shape": (lambda p: edit_entry(p / INDEX, NORM, whole_shape=[2**60]), "is not a tensor's entry"),
    "a wrong shape": (lambda p: edit_entry(p / INDEX, NORM, whole_shape=[65]), "final_layernorm"),
    "no pieces": (lambda p: edit_entry(p / INDEX, NORM, pieces=[]), "final_layernorm"),
    "a piece outside": (
        lambda p: edit_entry(p / INDEX, NORM, pieces=[{"whole": [[1, 65]], "local": [[0, 64]]}]),
        "final_layernorm",
    ),
    "many pieces": (
        lambda p: edit_entry(p / INDEX, NORM, pieces=[{"whole": [[0, 64]], "local": [[0, 64]]}] * 10**5),
        "is not a tensor's entry",
    ),
    "a tensor less": (
        lambda p: edit_json(p / INDEX, tensors={NORM: json.loads((p / INDEX).read_text())["tensors"][NORM]}),
        "only one side has",
    ),
    "no state": (lambda p: edit_json(p / "checkpoint.json", common={}), "has no model"),
    "a pickle": (lambda p: (p / "checkpoint.json").write_bytes(payload(p / "ran")), "not (UTF-8|valid JSON)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_that_names_it(kind, saved, tmp_path):
    trainer, folder = saved
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message) as refused:
        trainer.load(tmp_path / "checkpoint")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob("ran"))
    trainer.load(folder / "checkpoint")


def test_changed_values_are_found_by_convert_too(saved, tmp_path):
    _, folder = saved
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / TENSORS)
    tensors[NORM][3] += 1
    save_file(tensors, tmp_path / "checkpoint" / TENSORS)
    options = {"model": str(folder / "model"), "checkpoint": str(tmp_path / "checkpoint")}
    with pytest.raises(CheckpointError, match="damaged"):
        convert(ConvertConfig(**options, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_old_checkpoints_are_refused_with_the_command_that_rewrites_them(saved, old, tmp_path):
    trainer, folder = saved
    for read in (
        lambda: trainer.load(old),
        lambda: convert(ConvertConfig(model=str(folder / "model"), checkpoint=str(old), output=str(tmp_path / "x"))),
    ):
        with pytest.raises(ValueError, match=rf"lockstep convert checkpoint={old} .*allow_pickle=true"):
            read()
    with pytest.raises(ValueError, match="allow_pickle=true"):
        convert(ConvertConfig(checkpoint=str(old), new_checkpoint=str(tmp_path / "new")))
    convert(ConvertConfig(checkpoint=str(old), new_checkpoint=str(tmp_path / "new"), allow_pickle=True))
    resumed = MegatronTrainer(TrainerConfig(model=str(folder / "model"), load_format="dummy"))
    assert resumed.load(tmp_path / "new") == {"prompts": [1, 2]}
    assert (resumed.step_count, resumed.weights_hash()) == (1, trainer.weights_hash())
    with pytest.raises(ValueError, match="new exists"):
        convert(ConvertConfig(checkpoint=str(old), new_checkpoint=str(tmp_path / "new"), allow_pickle=True))


def test_the_checkpoints_of_a_run_are_rewritten_in_their_place(saved, old, tmp_path):
    trainer, folder = saved
    for step in (1, 2):
        step_folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(old, step_folder / "trainer")
        shutil.copytree(old if step == 1 else folder / "checkpoint", step_folder / "learner" / "critic")
        (step_folder / "learner" / "state.json").write_text("{}")
        content_hashes.write_folder_list(step_folder)
    with pytest.raises(ValueError, match=rf"lockstep convert run={tmp_path} allow_pickle=true"):
        trainer.load(tmp_path / "checkpoints" / "step_000001" / "learner" / "critic")
    assert convert(ConvertConfig(run=str(tmp_path), allow_pickle=True))["steps"] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    for step in (1, 2):
        step_folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        content_hashes.check_folder(step_folder)
        assert (step_folder / "learner" / "state.json").read_text() == "{}"
        for part in ("trainer", "learner/critic"):
            trainer.load(step_folder / part)
    assert convert(ConvertConfig(run=str(tmp_path), allow_pickle=True))["steps"] == []


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_payload_does_not_run_when_old_checkpoints_are_rewritten(file, old, tmp_path):
    shutil.copytree(old, tmp_path / "old")
    (tmp_path / "old" / file).write_bytes(payload(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        rewrite(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_payload_does_not_run_in_any_file_of_a_checkpoint(saved, old, tmp_path):
    trainer, folder = saved
    for source in (folder / "checkpoint", old):
        for file in sorted(path.name for path in source.iterdir()):
            shutil.rmtree(tmp_path / "foreign", ignore_errors=True)
            shutil.copytree(source, tmp_path / "foreign")
            (tmp_path / "foreign" / file).write_bytes(payload(tmp_path / "ran"))
            options = {"model": str(folder / "model"), "checkpoint": str(tmp_path / "foreign")}
            for read in (
                lambda: trainer.load(tmp_path / "foreign"),
                lambda options=options: convert(ConvertConfig(**options, output=str(tmp_path / "out"))),
            ):
                with pytest.raises(ValueError, match="foreign") as refused:
                    read()
                assert "\n" not in str(refused.value)
                assert not (tmp_path / "ran").exists(), file
    trainer.load(folder / "checkpoint")
