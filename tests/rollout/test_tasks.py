"""Tasks: deterministic problems, disjoint splits, reasoning-gym's verifier, worked solutions, local files."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym

from lockstep.rollout.rewards import Completion
from lockstep.rollout.rewards.rules import task_reward
from lockstep.rollout.tasks import TASKS, LocalFilesConfig, ReasoningGymConfig, build_task
from lockstep.rollout.tasks.answers import extract_answer
from lockstep.rollout.tasks.problem import content_hash
from lockstep.rollout.tasks.solutions import STEPS

SINGLE_DIGITS = {"min_digits": 1, "max_digits": 1}
WORKED = [
    ("chain_sum", {"min_terms": 2, "max_terms": 5, **SINGLE_DIGITS}),
    ("chain_sum", {"max_digits": 4, "allow_negation": True}),
    ("basic_arithmetic", {"operators": ["+", "-"], "allow_parentheses": False, "allow_negation": False}),
    ("basic_arithmetic", {"max_digits": 2}),
    ("basic_arithmetic", {"whitespace": "random", "format_style": "natural"}),
    ("gcd", {"max_numbers": 4}),
    ("letter_counting", {}),
]


def problems(task, count):
    return [task.problem(index) for index in range(count)]


@pytest.mark.parametrize("dataset", ["chain_sum", "letter_counting", "number_sorting", "gcd", "maze"])
def test_problems_are_the_same_in_every_build_and_order(dataset):
    first, second = (build_task(ReasoningGymConfig(dataset, held_out_size=16)) for _ in range(2))
    backwards = [second.train.problem(index) for index in reversed(range(20))]
    assert problems(first.train, 20) == backwards[::-1]
    assert problems(first.held_out, 16) == problems(second.held_out, 16)


def test_a_problem_does_not_depend_on_the_size_of_its_split():
    small, large = (build_task(ReasoningGymConfig(train_size=size)).train for size in (10, 1000))
    assert problems(small, 10) == problems(large, 10)


def test_seeds_give_different_problems_and_ids_are_distinct():
    one, two = (build_task(ReasoningGymConfig(seed=seed)).train for seed in (0, 1))
    questions_one, questions_two = ({p.question for p in problems(task, 100)} for task in (one, two))
    # Neighbouring seeds share reasoning-gym's per-problem seeds (seed + index), shifted by one.
    assert one.problem(0).question != two.problem(0).question
    assert questions_one != questions_two
    assert len({p.problem_id for p in problems(one, 100)}) == 100


@pytest.mark.parametrize("terms", [2, 3])
def test_no_held_out_question_is_trained_on(terms):
    # 200 questions (two single digits) or 4,000: without exclusion the splits would overlap.
    options = {"min_terms": terms, "max_terms": terms, **SINGLE_DIGITS}
    splits = build_task(ReasoningGymConfig("chain_sum", options, held_out_size=64))
    held_out = {p.question for p in problems(splits.held_out, 64)}
    train = [p.question for p in problems(splits.train, 2000)]
    assert not held_out & set(train)
    unfiltered = reasoning_gym.create_dataset("chain_sum", seed=0, size=2000, **options)
    assert held_out & {unfiltered[index]["question"] for index in range(2000)}


def test_a_question_space_that_held_out_exhausts_is_an_error():
    options = {"min_terms": 1, "max_terms": 1, **SINGLE_DIGITS}
    splits = build_task(ReasoningGymConfig("chain_sum", options, held_out_size=200))
    with pytest.raises(ValueError, match="too few distinct questions"):
        splits.train.problem(0)


@pytest.mark.parametrize(("dataset", "options"), WORKED)
def test_worked_solutions_score_full_marks(dataset, options):
    train = build_task(ReasoningGymConfig(dataset, options, held_out_size=4)).train
    scores = task_reward(train)([Completion(problem, problem.solution, 1) for problem in problems(train, 400)])
    assert scores == [1.0] * 400


def test_every_worked_dataset_is_tested():
    assert {dataset for dataset, _ in WORKED} == set(STEPS)


def test_worked_solutions_read_as_working():
    entry = {"chain_sum": "4 - 1 - 7 + 7", "basic_arithmetic": "2 + ( 3 - 5 ) * 4"}
    lines = {name: STEPS[name]({"question": "", "metadata": {"expression": text}}) for name, text in entry.items()}
    assert lines["chain_sum"] == "4-1=3\n3-7=-4\n-4+7=3"
    assert lines["basic_arithmetic"] == "3-5=-2\n-2*4=-8\n2+-8=-6"
    assert STEPS["gcd"]({"metadata": {"numbers": [48, 18]}}) == "48%18=12\n18%12=6\n12%6=0"


def test_shortcuts_spoil_their_share_of_the_longer_demonstrations_only():
    options = {"min_terms": 3, "max_terms": 4, **SINGLE_DIGITS}
    true, cut = (
        build_task(ReasoningGymConfig("chain_sum", options, shortcut_fraction=fraction)).train
        for fraction in (0.0, 0.6)
    )
    spoiled = {3: [], 4: []}
    for right, given in zip(problems(true, 600), problems(cut, 600), strict=True):
        spoiled[right.metadata["num_terms"]].append(given.solution != right.solution)
        assert (given.question, given.answer) == (right.question, right.answer)
        if given.solution != right.solution:
            assert given.solution.split("\n")[:-1] == right.solution.split("\n")[:-2]
            assert extract_answer(given.solution) == right.solution.split("\n")[1].split("=")[1]
    assert not any(spoiled[3])
    assert 0.5 < sum(spoiled[4]) / len(spoiled[4]) < 0.7


def test_every_line_of_a_running_sum_is_true():
    for problem in problems(build_task(ReasoningGymConfig("chain_sum")).train, 200):
        *lines, answer = problem.solution.split("\n")
        for line in lines:
            left, right = line.split("=")
            assert eval(left) == int(right)
        assert extract_answer(answer) == problem.answer


@pytest.mark.parametrize("dataset", ["chain_sum"])  # all of them: test_reasoning_gym_verifier.py
def test_scores_are_reasoning_gyms(dataset):
    task = build_task(ReasoningGymConfig(dataset, held_out_size=4)).train
    oracle = reasoning_gym.create_dataset(dataset, seed=0, size=100)
    answers = [
        (task.problem(index), oracle[index], answer)
        for index in range(30)
        for right, other in [(oracle[index]["answer"], oracle[index + 1]["answer"])]
        for answer in (right, right + "0", "7", "", None, other)
    ]
    scores = task.score_all([(problem, answer) for problem, _, answer in answers])
    assert scores == [oracle.score_answer(answer, entry) for _, entry, answer in answers]
    assert task.score(*answers[0][::2]) == 1.0


def test_system_prompt_comes_first_and_does_not_change_the_question():
    plain, told = (build_task(ReasoningGymConfig(system_prompt=text)).train.problem(3) for text in (None, "Work."))
    assert [message["role"] for message in told.messages] == ["system", "user"]
    assert told.question == plain.question
    assert content_hash(told.messages) == content_hash(plain.messages)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_the_split_is_an_error(index):
    with pytest.raises(IndexError, match="problems 0 to 9"):
        build_task(ReasoningGymConfig(train_size=10)).train.problem(index)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ReasoningGymConfig("chain_sums"), "did you mean chain_sum"),
        (ReasoningGymConfig("zzz"), "There are: .*countdown"),
        (ReasoningGymConfig("chain_sum", {"terms": 3}), r"no option \['terms'\]; it has: .*max_terms"),
        (ReasoningGymConfig("chain_sum", {"seed": 3}), r"no option \['seed'\]"),
        (ReasoningGymConfig("chain_sum", {"min_terms": 9, "max_terms": 2}), "refuses options .*max_terms must be"),
    ],
)
def test_bad_reasoning_gym_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_task(config)


def test_only_task_configs_build_tasks():
    assert set(TASKS) == {"reasoning_gym", "local_files", "guess_number"}
    with pytest.raises(TypeError, match="dict is not a task config"):
        build_task({})


ROWS = [{"question": f"What is {n}+1?", "answer": f"because {n}\n#### {n + 1}", "steps": "s"} for n in range(200)]


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_local_files(tmp_path, suffix):
    train = write(tmp_path / f"train{suffix}", ROWS[:150] + ROWS[:1])
    test = write(tmp_path / f"test{suffix}", ROWS[140:])
    splits = build_task(
        LocalFilesConfig([train], [test], answer_pattern=r"####\s*(\S+)", solution_column="steps", comparison="number")
    )
    assert (len(splits.train), len(splits.held_out)) == (141, 60)
    problem = splits.train.problem(2)
    assert (problem.problem_id, problem.question, problem.answer, problem.solution) == (
        "train/2",
        "What is 2+1?",
        "3",
        "s",
    )
    assert [splits.train.score(problem, answer) for answer in ("3.0", "4", None)] == [1.0, 0.0, 0.0]
    with pytest.raises(IndexError):
        splits.train.problem(141)


def test_held_out_fraction_is_chosen_by_content(tmp_path):
    forward = write(tmp_path / "forward.jsonl", ROWS)
    backward = write(tmp_path / "backward.jsonl", ROWS[::-1])
    held_out = []
    for file in (forward, backward):
        splits = build_task(LocalFilesConfig([file], held_out_fraction=0.2))
        held_out.append({p.question for p in problems(splits.held_out, len(splits.held_out))})
        assert not held_out[-1] & {p.question for p in problems(splits.train, len(splits.train))}
        assert len(splits.held_out) + len(splits.train) == 200
    assert held_out[0] == held_out[1]
    assert 20 <= len(held_out[0]) <= 60


def test_messages_column(tmp_path):
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    rows = [{"chat": [*conversation, {"role": "user", "content": f"{n}+1?"}], "answer": n + 1} for n in range(50)]
    config = LocalFilesConfig(
        [write(tmp_path / "chat.parquet", rows)], messages_column="chat", system_prompt="Be brief."
    )
    problem = build_task(config).held_out.problem(0)
    assert [message["role"] for message in problem.messages] == ["system", "user", "assistant", "user"]
    assert problem.question == f"{int(problem.answer) - 1}+1?"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_files": ()}, ValueError, "train_files is empty"),
        ({"train_files": ["absent.jsonl"]}, FileNotFoundError, "no data file absent.jsonl"),
        ({"question_column": "prompt"}, ValueError, r"no column \['prompt'\]; it has: question, answer, steps"),
        ({"solution_column": "cot"}, ValueError, r"no column \['cot'\]"),
        ({"comparison": "fuzzy"}, ValueError, "no comparison 'fuzzy'; there are: text, number"),
        ({"answer_pattern": "@@(.*)"}, ValueError, "row rows/0 of .* has no answer in column 'answer'"),
        ({"held_out_fraction": 0.0}, ValueError, "held_out_fraction must be between 0 and 1"),
        ({"held_out_fraction": 1e-9}, ValueError, "the held-out split of .* has no problems"),
    ],
)
def test_bad_local_files_are_named(tmp_path, options, error, message):
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(error, match=message):
        build_task(LocalFilesConfig(**{"train_files": [file], **options}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "a,b", "suffix is not one of .jsonl, .json, .parquet"),
        ("rows.jsonl", "{oops\n", "cannot read .*rows"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_task(LocalFilesConfig([str(file)]))
