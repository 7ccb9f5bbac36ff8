"""Whatever a verifier or the text that it judges does: one sample scores 0 for a named reason, and the run goes on."""

import json
import os
import pickle
import sys
import time
from dataclasses import replace

import psutil
import pytest

from lockstep.engine.files import write_whole
from lockstep.rollout.rewards import Completion, FailedScore, LocalRewards, StepFailures, VerifierError, build_reward
from lockstep.rollout.rewards.isolation import Limits
from lockstep.rollout.rewards.verifiers import Verifier, VerifierPool
from lockstep.rollout.tasks import Problem

LIMITS = Limits(wall_time_s=60.0, cpu_time_s=1, memory_bytes=1 << 28, file_bytes=1 << 16)
PROBLEM = Problem("p", ({"role": "user", "content": "?"},), "7", {"list": [1, 2], "tuple": (1, {2: "two"})})

# What the function below does for a text, and the reason that the sample's failure gives. None: it scores len(text).
TEXTS = {
    "a": None,
    "sleep": "wall time: more than 3.0 s",
    "bb": None,
    "raise": "KeyError: 'missing'",
    "exit": "SystemExit: 0",
    "interrupt": "KeyboardInterrupt",
    "recurse": "RecursionError",
    "eat": "MemoryError",
    "ccc": None,
    "nothing": "returned None (NoneType); it must return a finite number: is a `return` missing?",
    "text": "returned '1.0' (str); it must return",
    "nan": "returned nan; it must return a finite number",
    "huge": "that is no number",
    "loop": "time",  # of the CPU, or on a busy machine of the wall
    "leave": "it ended without a score (exit code 3)",
    "die": "stopped by SIGSEGV",
    "forge": "it wrote where its result belongs",
    "flood": "it wrote where its result belongs",
    "write": "it must return a finite number",
    "prints": None,
    "relative": None,
    "own_file": None,
    "async": None,
    "dddd": None,
}
FUNCTION = """
import asyncio, dataclasses, os, pathlib, signal, sys, tempfile, time
import neighbour

@dataclasses.dataclass
class Kept:
    words: "list[str]"

WORDS = pathlib.Path(__file__).with_name("words.txt").read_text().split()

def write(data):
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, data)
        except OSError:
            pass

async def soon(number):
    await asyncio.sleep(0)
    return number

def score(problem, text):
    score = float(len(text))
    if text == "sleep": time.sleep(99)
    if text == "raise": raise KeyError("missing")
    if text == "exit": sys.exit(0)
    if text == "interrupt": raise KeyboardInterrupt
    if text == "recurse": globals()["score"](problem, text)
    if text == "eat": return sum(bytearray(1 << 29))
    if text == "nothing": return None
    if text == "text": return "1.0"
    if text == "nan": return float("nan")
    if text == "huge": return 10**400
    if text == "loop":
        while True: pass
    if text == "leave": os._exit(3)
    if text == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if text == "forge": write(b"[NaN, null]\\n"); os._exit(0)
    if text == "flood": write(b"x" * 100000)
    if text == "write": write(b""); return {"score": 1}
    if text == "prints": print("9.0"); os.write(2, b"9.0\\n")
    if text == "relative": assert open("words.txt").read()
    if text == "own_file":
        with tempfile.TemporaryFile() as file: file.write(b"x")
    if text == "async": return soon(score)
    assert problem.question == "?" and problem.metadata["tuple"] == (1, {2: "two"})
    assert neighbour.TWO == 2 and WORDS == ["one", "two"] and Kept([]).words == []
    assert getattr(neighbour, "seen", text) == text  # nothing of another text is left here
    neighbour.seen = text
    return score
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    (path / "mine.py").write_text(FUNCTION)
    (path / "neighbour.py").write_text("TWO = 2\n")
    (path / "words.txt").write_text("one two")
    return path


@pytest.fixture
def pool(folder):
    limits = replace(LIMITS, wall_time_s=3.0)
    pool = VerifierPool(Verifier("mine", f"{folder}/mine.py:score", limits=limits, cwd=str(folder)), num_workers=2)
    yield pool
    pool.close()


def children():
    """Within bubblewrap each has children of its own."""
    return {child.pid for child in psutil.Process().children()}


def test_each_text_that_breaks_something_scores_0_for_a_reason_and_the_others_go_on(pool, caplog):
    before = children()
    scores = pool.verify([(PROBLEM, text) for text in TEXTS])
    for (text, reason), score in zip(TEXTS.items(), scores, strict=True):
        assert score == (len(text) if reason is None else 0.0), getattr(score, "reason", text)
        assert isinstance(score, FailedScore) == (reason is not None), text
        if reason is not None:
            assert reason in score.reason
    assert len(caplog.records) == 1, "one warning, not one for each"
    assert "verifier mine failed on p: " in caplog.text
    kept = children() - before
    assert kept, "the pool stays warm"
    assert pool.verify([(PROBLEM, "e" * 5), (PROBLEM, "sleep")]) == [5.0, 0.0]  # the second is remembered
    assert children() - before == kept
    pool.close()
    assert children() <= before


@pytest.mark.parametrize("each_alone", [True, False])
def test_a_dead_worker_is_no_text_s_failure(pool, each_alone):
    pool = VerifierPool(replace(pool.verifier, each_alone=each_alone))
    assert pool.verify([(PROBLEM, "a")]) == [1.0]
    for worker in list(pool._workers):
        worker.process.kill()
        worker.process.wait()
    assert pool.verify([(PROBLEM, "bb")]) == [2.0]
    pool.close()
    copy = pickle.loads(pickle.dumps(pool))
    assert copy.verify([(PROBLEM, "ccc")]) == [3.0]
    copy.close()


def test_workers_end_with_the_process_that_started_them(pool, tmp_path):
    pid = os.fork()
    if pid == 0:  # a run that is killed while a text is judged
        try:
            slow = replace(pool.verifier, limits=LIMITS)
            mine = VerifierPool(slow)
            mine.open()
            worker = psutil.Process(mine._workers[0].process.pid)
            write_whole(tmp_path / "pids", json.dumps([worker.pid, len(worker.children(recursive=True))]))
            mine.verify([(PROBLEM, "sleep")])
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    number, num_started = json.loads((tmp_path / "pids").read_text())
    worker = psutil.Process(number)
    while len(judging := worker.children(recursive=True)) < num_started + 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs([worker, *judging], timeout=30)
    assert alive == []


def test_problems_that_cannot_be_sent_and_files_that_do_not_load_are_named(pool, folder):
    unsendable = replace(PROBLEM, problem_id="bad", metadata={"f": lambda: 0})
    with pytest.raises(ValueError, match="problem bad cannot be sent to a verifier"):
        pool.verify([(unsendable, "a")])
    (folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"exits: cannot load the reward function .*exits.py:2: SystemExit: 0"):
        VerifierPool(Verifier("exits", f"{folder}/exits.py:score")).open()
    (folder / "leaves.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(ValueError, match=r"leaves: its process ended while it was loaded .*exit code 4"):
        VerifierPool(Verifier("leaves", f"{folder}/leaves.py:score")).open()


def test_an_isolated_reward_as_documented(folder, monkeypatch):
    monkeypatch.chdir(folder)
    terms = {"mine": {"kind": "function", "path": "mine.py:score", "limits": {"wall_time_s": 5, "memory_bytes": 10**9}}}
    completions = [Completion(PROBLEM, text, 1) for text in ("a", "relative", "raise")]
    with LocalRewards() as rewards:
        reward = rewards.build({**terms, "format": 1.0}, None)
        started = children()
        for task in (None, object()):  # evaluations build their rewards anew
            rewards.build({**terms, "format": 1.0}, task)
        assert children() == started
        monkeypatch.chdir("/")  # what a run does later does not matter
        before = children()
        assert reward(completions) == [1.0, 8.0, 0.0]
        assert isinstance(reward(completions)[2], FailedScore)
    assert len(children()) < len(before), "closed with the rewards"


def test_an_isolated_reward_by_its_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "in_the_working_folder.py").write_text("def score(problem, response): return len(response)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with LocalRewards() as rewards:
        reward = rewards.build({"in_the_working_folder.score": {"limits": {"wall_time_s": 60}}}, None)
        assert reward([Completion(PROBLEM, "abc", 1)]) == [3.0]


def test_a_step_whose_scores_all_fail_alike_ends_with_the_reason():
    failed, other = FailedScore(0.0, "no file x"), FailedScore(0.0, "no file y")
    failures = StepFailures()
    failures.add(["a", "b", "c"], [failed, 1.0, 0.5], [failed, failed, 0.0])
    assert failures.take() == 2
    assert failures.take() == 0
    failures.add(["a", "b"], [failed, other])
    assert failures.take() == 2
    failures.add(["a", "a"], [failed, failed])  # one text may be the reason itself
    assert failures.take() == 2
    failures.add(["a", "b"], [failed, 0.0], [0.0, failed])
    with pytest.raises(VerifierError, match="every one of 2 scores failed for the same reason: no file x"):
        failures.take()
    assert pickle.loads(pickle.dumps(failed)).reason == "no file x"


def test_mathematics_in_one_warm_process():
    cases = [
        (r"\frac{1}{2}", "<answer>0.5</answer>", 1.0),
        ("x^2+2x+1", "so it is $(x+1)^2$", 1.0),
        ("1/2", r"The result is \boxed{\frac{2}{4}}.", 1.0),
        ("7", "<answer>8</answer>", 0.0),
        ("7", "no idea", 0.0),
    ]
    reward = build_reward({"math": {"limits": {"wall_time_s": 60}, "num_workers": 1}}, None, None)
    completions = [
        Completion(Problem(str(n), PROBLEM.messages, answer), response, 1)
        for n, (answer, response, _) in enumerate(cases)
    ]
    assert reward(completions) == [score for _, _, score in cases]
