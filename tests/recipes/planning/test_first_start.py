"""What a run settles at its first start is found again by what comes later, on whichever day that is."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from chat_shapes import SHAPES, tokenizer_of
from huggingface_hub import constants
from models import make_hf_model

from lockstep.engine import EngineConfig
from lockstep.engine.text.config import ChatConfig
from lockstep.recipes import reward
from lockstep.recipes.config_schema import to_plain
from lockstep.recipes.conversion.export import complete_export, push
from lockstep.recipes.evaluation import evaluate
from lockstep.recipes.inputs import sizes_and_tokenizer, starting_directory
from lockstep.recipes.planning import first_start
from lockstep.recipes.planning.first_start import resumed
from lockstep.recipes.planning.room import rl_with_room, sft_with_room
from lockstep.recipes.rl import replay, rl, sft
from lockstep.recipes.runs.config import START, ModelSource
from lockstep.recipes.runs.run_directory import read_rollouts
from lockstep.rollout.config import EvaluationConfig, RolloutConfig
from lockstep.rollout.environments import EnvironmentConfig
from lockstep.rollout.tasks import LocalFilesConfig, ReasoningGymConfig, TaskSplits
from lockstep.rollout.tasks.answers import ANSWER_INSTRUCTION
from lockstep.rollout.tasks.config import TaskConfig
from lockstep.rollout.tokenizer import load_tokenizer, render_prompt
from lockstep.rollout.worker import RolloutWorker

GCD = ReasoningGymConfig(dataset="gcd", train_size=20, held_out_size=4)


def as_if_on(day, monkeypatch):
    class Day(first_start.datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(first_start.datetime, "date", Day)


def keep(config):
    """What a run does with its config."""
    config.directory.mkdir(parents=True, exist_ok=True)
    (config.directory / "config.yaml").write_text(yaml.safe_dump(to_plain(replace(config, run=None))))


def test_the_day_of_the_first_start_stays(tmp_path, monkeypatch):
    given = rl.RLConfig(runs_dir=str(tmp_path), task=TaskConfig(reasoning_gym=GCD))
    as_if_on("2026-03-01", monkeypatch)
    first = resumed(given)
    assert first.chat.date == "2026-03-01"
    keep(first)
    as_if_on("2026-03-02", monkeypatch)
    assert resumed(given) == first
    assert resumed(rl.RLConfig(run=str(first.directory))).chat.date == "2026-03-01"
    assert resumed(replace(given, name="another")).chat.date == "2026-03-02"
    assert resumed(replace(given, chat=ChatConfig(date="2024-07-26"))).chat.date == "2024-07-26"


def test_a_run_of_before_keeps_what_it_did_not_settle(tmp_path, monkeypatch):
    given = rl.RLConfig(runs_dir=str(tmp_path), task=TaskConfig(reasoning_gym=GCD), model=ModelSource(path="x"))
    given.directory.mkdir()
    (given.directory / "config.yaml").write_text(
        yaml.safe_dump({"task": {"kind": "reasoning_gym"}, "model": {"path": "x"}})
    )
    assert resumed(given).chat.date is None
    assert resumed(given).task.answer_instruction is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with Llama's template, which writes the day."""
    path = tmp_path_factory.mktemp("run") / "model"
    tokenizer = tokenizer_of(SHAPES["llama 3"])
    make_hf_model(path, "llama", seed=1, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(path)
    return path


def test_an_evaluation_of_a_runs_model_has_the_runs_day(model, monkeypatch):
    config = model.parent / "config.yaml"
    as_if_on("2026-03-02", monkeypatch)
    config.unlink(missing_ok=True)
    assert first_start.settled_for_model(ChatConfig(), str(model)).date == "2026-03-02"
    chat = {
        "template": "gone.jinja",
        "chat_template_kwargs": {"a": 1},
        "date": "2026-03-01",
        "without_template": "plain",
    }
    config.write_text(yaml.safe_dump({"chat": chat, "model": {"path": None}}))
    assert first_start.settled_for_model(ChatConfig(), str(model)) == ChatConfig(None, {"a": 1}, "2026-03-01", "plain")
    assert first_start.settled_for_model(ChatConfig(date="2024-01-01"), str(model)) == ChatConfig(date="2024-01-01")
    assert first_start.made_from_nothing(str(model))
    config.write_text(yaml.safe_dump({"model": {"path": str(model)}}))
    assert not first_start.made_from_nothing(str(model))  # and no endless circle
    config.write_text(yaml.safe_dump({"model": {"path": "/models/x"}}))
    assert not first_start.made_from_nothing(str(model))
    config.write_text("a: [")
    assert not first_start.made_from_nothing(str(model))
    config.unlink()


def test_questions_say_how_to_write_the_answer_for_models_that_are_given(tmp_path):
    made = resumed(rl.RLConfig(runs_dir=str(tmp_path), task=TaskConfig(reasoning_gym=GCD)))
    given = resumed(
        rl.RLConfig(
            runs_dir=str(tmp_path),
            task=TaskConfig(reasoning_gym=GCD),
            model=ModelSource(path="/models/x"),
            evaluation_tasks={"b": TaskConfig(reasoning_gym=GCD)},
        )
    )
    assert made.task.answer_instruction is None
    assert given.task.answer_instruction == given.evaluation_tasks["b"].answer_instruction == ANSWER_INSTRUCTION
    plain, told = made.task.build().train, given.task.build().train
    for index in range(5):
        question, other = plain.problem(index), told.problem(index)
        assert other.messages[-1]["content"] == f"{question.question}\n\n{ANSWER_INSTRUCTION}"
        assert (other.question, other.problem_id) == (question.question, question.problem_id)
        assert told.score(other, other.answer) == 1.0
    assert len(told) == len(plain)
    own = replace(given.task, answer_instruction="Say it in one word.")
    assert own.build().train.problem(0).messages[-1]["content"].endswith("\n\nSay it in one word.")


def test_a_conversation_that_speaks_of_answer_tags_is_left_alone():
    config = replace(GCD, system_prompt="Answer between <answer> and </answer>.")
    told = TaskConfig(reasoning_gym=config, answer_instruction=ANSWER_INSTRUCTION).build().train
    assert told.problem(0).messages == TaskConfig(reasoning_gym=config).build().train.problem(0).messages


COMMIT = "c" * 40


def test_hub_commits_are_kept(tmp_path, monkeypatch, model):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "hub" / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (home / "snapshots").mkdir()
    (home / "snapshots" / COMMIT).symlink_to(model)
    given = rl.RLConfig(
        runs_dir=str(tmp_path / "runs"),
        task=TaskConfig(reasoning_gym=GCD),
        model=ModelSource(path="org/name"),
        reward={"judge": {"model": "org/name@main"}, "format": 0.1},
    )
    first = resumed(given)
    assert first.model.path == f"org/name@{COMMIT}"
    assert first.reward == {"judge": {"model": f"org/name@{COMMIT}", "date": first.chat.date}, "format": 0.1}
    assert starting_directory(first.model, tmp_path / "none", None, 0) == home / "snapshots" / COMMIT
    sizes, tokenizer = sizes_and_tokenizer(first.model, None, ChatConfig())
    assert (sizes.family, tokenizer.chat_template) == ("llama", SHAPES["llama 3"].template)
    keep(first)
    (home / "refs" / "main").write_text("d" * 40)  # the hub has moved on
    assert resumed(replace(given, reward={})).model.path == f"org/name@{COMMIT}"
    with pytest.raises(ValueError, match="the model org/absent is neither"):
        resumed(replace(given, model=ModelSource(path="org/absent")))
    with pytest.raises(ValueError, match="push_to_hub=x"):
        resumed(replace(given, push_to_hub="x"))


def rows(path, lengths, solution=None):
    content = [{"question": "7" * n + f" {i}", "answer": "7", "worked": solution or "7"} for i, n in enumerate(lengths)]
    path.write_text("\n".join(map(json.dumps, content)))
    return str(path)


def local(tmp_path, lengths=(1, 9, 4000, 2), overlong="error", **options):
    files = LocalFilesConfig(
        [rows(tmp_path / "rows.jsonl", lengths, **options)],
        [rows(tmp_path / "other.jsonl", [3, 5])],
        solution_column="worked",
    )
    return TaskConfig(kind="local_files", local_files=files, answer_instruction=None, overlong=overlong)


def test_a_prompt_without_room_is_named_before_anything_starts(tmp_path, model):
    config = rl.RLConfig(
        runs_dir=str(tmp_path / "runs"),
        task=local(tmp_path),
        model=ModelSource(path=str(model)),
        rollout=RolloutConfig(max_tokens=40),
        evaluation=EvaluationConfig(max_tokens=40),
    )
    for run, at_start in ((rl, replace(config, dry_run=True)), (rl, config), (sft, None)):
        stage = at_start or sft.SFTConfig(runs_dir=config.runs_dir, task=config.task, model=config.model)
        with pytest.raises(
            ValueError, match=r"problem rows/2 of task 'rows' has no room: its prompt has 4,0\d\d tokens"
        ):
            run.run(stage)
        assert not (tmp_path / "runs").exists()


def test_problems_without_room_can_be_left_out(tmp_path, model, capsys):
    config = rl.RLConfig(task=local(tmp_path, overlong="skip"), model=ModelSource(path=str(model)))
    tasks, _ = rl_with_room(config, config.task.build(), {})
    assert [tasks.train.problem(index).problem_id for index in range(len(tasks.train))] == [
        "rows/0",
        "rows/1",
        "rows/3",
    ]
    assert "1 of 4 problems of 'rows' are skipped; the first: rows/2 has no room" in capsys.readouterr().out
    assert tasks.train.score(tasks.train.problem(2), "7") == 1.0
    with pytest.raises(IndexError):
        tasks.train.problem(3)
    everything = replace(config, task=local(tmp_path, (4000, 5000), "skip"))
    with pytest.raises(ValueError, match="none of the 2 problems of task 'rows' has room"):
        rl_with_room(everything, everything.task.build(), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": {"max_model_len": 64}},
            r"rows/1 .* tokens and its response needs 1, and engine.max_model_len allows 64",
        ),
        (
            {"trainer": {"max_tokens_per_micro_batch": 80}},
            r"needs 40, and trainer.max_tokens_per_micro_batch allows 80",
        ),
        (
            {"environment": {"kind": "calculator", "max_episode_tokens": 50}},
            r"environment.max_episode_tokens allows 50",
        ),
    ],
)
def test_every_limit_counts(tmp_path, model, changes, message):
    config = rl.RLConfig(
        task=local(tmp_path, (1, 40)), model=ModelSource(path=str(model)), rollout=RolloutConfig(max_tokens=40)
    )
    for name, fields in changes.items():
        made = EnvironmentConfig(**fields) if name == "environment" else replace(getattr(config, name), **fields)
        config = replace(config, **{name: made})
    with pytest.raises(ValueError, match=message):
        rl_with_room(config, config.task.build(), {})


def test_held_out_problems_and_other_tasks_need_room_too(tmp_path, model):
    config = rl.RLConfig(task=local(tmp_path, (1, 2)), model=ModelSource(path=str(model)))
    long = replace(config, evaluation_tasks={"long": local(tmp_path, (1, 4000))})
    splits = TaskSplits(config.task.build().train, long.evaluation_tasks["long"].build().train)
    with pytest.raises(ValueError, match="problem rows/1"):
        rl_with_room(config, splits, {})
    with pytest.raises(ValueError, match="problem rows/1"):
        rl_with_room(long, config.task.build(), {"long": splits.held_out})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"lengths": (1, 2), "solution": "7" * 4000}, r"problem rows/0 .*its worked solution 4,0\d\d, and"),
        ({"lengths": (1, 9)}, None),
    ],
)
def test_worked_solutions_need_room(tmp_path, model, task, message):
    config = sft.SFTConfig(task=local(tmp_path, **task), model=ModelSource(path=str(model)))
    if message is None:
        assert len(sft_with_room(config, config.task.build()).train) == 2
        none = replace(config.task, local_files=replace(config.task.local_files, solution_column=None))
        message, config = "problem rows/0 .* has no worked solution", replace(config, task=none)
    with pytest.raises(ValueError, match=message):
        sft_with_room(config, config.task.build())


def test_a_conversation_that_the_template_refuses_is_named(tmp_path, model):
    template = tmp_path / "strict.jinja"
    template.write_text(SHAPES["gemma"].template)
    task = local(tmp_path, (1, 2))
    task = replace(task, local_files=replace(task.local_files, system_prompt="Be brief."))
    config = rl.RLConfig(task=task, model=ModelSource(path=str(model)), chat=ChatConfig(template=str(template)))
    with pytest.raises(
        ValueError, match=r"problem rows/0 .*cannot be asked: the chat template .*System role not supported"
    ):
        rl_with_room(config, config.task.build(), {})


def test_an_export_has_the_template_and_the_end_that_were_trained(tmp_path):
    tokenizer_of(SHAPES["qwen base"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 280, "pad_token_id": 0}))
    template = tmp_path / "own.txt"
    template.write_text(
        "Q: {{ messages[0].content }}{% if messages | length > 1 %} A: {{ messages[1].content }}<|im_end|>{% endif %}"
    )
    complete_export(tmp_path, ChatConfig(template=str(template)))
    exported = load_tokenizer(tmp_path)
    assert exported.decode(render_prompt(exported, [{"role": "user", "content": "?"}])) == "Q: ?"
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    end = exported.convert_tokens_to_ids("<|im_end|>")
    assert generation == {"eos_token_id": [280, end], "pad_token_id": 0}
    before = (tmp_path / "generation_config.json").read_bytes()
    complete_export(tmp_path, ChatConfig())
    assert (tmp_path / "generation_config.json").read_bytes() == before


def test_a_base_models_export_has_the_plain_template(tmp_path):
    tokenizer_of(replace(SHAPES["mistral"], template=None)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    complete_export(tmp_path, ChatConfig(without_template="plain"))
    exported = load_tokenizer(tmp_path)
    assert exported.decode(render_prompt(exported, [{"role": "user", "content": "?"}])) == "?\n"
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": exported.eos_token_id}


def test_a_push_that_fails_loses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("no\nnetwork"))
    )
    text = push(tmp_path, "org/name")
    assert text.startswith(f"not pushed to org/name: no network; the model is in {tmp_path}, and `hf upload org/name")
    assert text in capsys.readouterr().err


def test_a_push_uploads_the_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo, **k: calls.append((repo, k)) or "https://x/org/name"
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: calls.append(k))
    assert push(tmp_path, "org/name") == "https://x/org/name"
    assert calls == [
        ("org/name", {"private": True, "exist_ok": True}),
        {"repo_id": "org/name", "folder_path": tmp_path},
    ]


def test_what_comes_on_another_day_reads_the_same_prompts(tmp_path, model, monkeypatch, capsys):
    task = local(tmp_path, (1, 2, 3))

    def run(day, steps):
        as_if_on(day, monkeypatch)
        return rl.run(
            rl.RLConfig(
                runs_dir=str(tmp_path / "runs"),
                task=task,
                model=ModelSource(path=str(model)),
                engine=EngineConfig(model=START, kv_cache_tokens=2048),
                rollout=RolloutConfig(prompts_per_step=2, samples_per_prompt=2, max_tokens=6),
                evaluation=EvaluationConfig(num_problems=1, max_tokens=6),
                steps=steps,
                checkpoint_every=1,
            )
        )

    run("2026-03-01", 1)
    resumed_run = run("2026-03-02", 2)
    path, decode = tmp_path / "runs" / "rl", load_tokenizer(model).decode
    for step in (1, 2):
        assert all("Today Date: 01 Mar 2026" in decode(sample["prompt_ids"]) for sample in read_rollouts(path, step))
    as_if_on("2026-03-03", monkeypatch)
    assert replay.run(replay.ReplayConfig(run=str(path)))["differences"] == 0
    capsys.readouterr()
    engine, number = EngineConfig(model=resumed_run["model"], kv_cache_tokens=2048), EvaluationConfig(1, max_tokens=6)
    for day, chat in (("2026-03-04", ChatConfig()), ("2026-03-05", ChatConfig(date="2026-03-05"))):
        as_if_on(day, monkeypatch)
        evaluate.run(evaluate.EvalConfig(engine, task, evaluation=number, chat=chat))
        assert f"Today Date: {'01' if chat.date is None else '05'} Mar 2026" in capsys.readouterr().out


def test_pairs_without_room_are_named_by_their_row(tmp_path, model, capsys):
    rows = [{"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (1, 2, 4000, 3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = reward.RewardConfig(
        model=ModelSource(path=str(model)),
        task=TaskConfig(reasoning_gym=GCD),
        train_files=(str(tmp_path / "pairs.jsonl"),),
        runs_dir=str(tmp_path / "runs"),
    )
    with pytest.raises(
        ValueError, match=r"row pairs/2 of .*line 3\) has no room: it has 4,\d\d\d tokens, and the model takes"
    ):
        reward.run(config)
    assert not (tmp_path / "runs").exists()
    train, held_out = reward.given_pairs(replace(config, task=replace(config.task, overlong="skip")))
    assert (len(train), len(held_out)) == (2, 1)
    assert "1 of 4 pairs are skipped; the first: row pairs/2" in capsys.readouterr().out
    small = replace(config.trainer, max_tokens_per_micro_batch=64)
    with pytest.raises(ValueError, match=r"row pairs/0 .*both responses have"):
        reward.given_pairs(replace(config, trainer=small))


def test_an_evaluation_names_what_has_no_room_before_the_model_is_loaded(tmp_path, model, monkeypatch):
    monkeypatch.setattr(evaluate, "Engine", None)
    task = local(tmp_path, (1, 2))
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": "7" * 4000, "answer": "7", "worked": "7"}))
    with pytest.raises(ValueError, match="problem other/0 of task 'rows' has no room"):
        evaluate.run(evaluate.EvalConfig(EngineConfig(model=str(model)), task))


def test_what_sft_teaches_stops_generation(tmp_path, model):
    tokenizer = load_tokenizer(model)
    end, end_of_text = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    task = local(tmp_path, (1, 2)).build().train
    taught = sft.example_sequence(tokenizer, task, 0)
    assert taught.token_ids[-1] == end != tokenizer.eos_token_id == end_of_text
    assert taught.loss_mask[-2:] == [True, True]
    engine = SimpleNamespace(config=EngineConfig(model=str(model)))
    worker = RolloutWorker(engine, tokenizer, task, None, RolloutConfig(), 0)
    assert worker.sampling_params(1, 5).stop_token_ids == (end, end_of_text)
