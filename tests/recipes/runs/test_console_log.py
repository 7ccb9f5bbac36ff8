"""What a command says: lines where something begins, and that it still works; run.log holds all of it."""

import io
import logging
import time
import warnings

import numba
import numpy as np
import pytest
from rich.console import Console

from lockstep.recipes.runs import console_log, machine
from lockstep.recipes.runs.console_log import IN_THE_LOG_ALONE, PACKAGE, STEPS, ConsoleLog, compilers_say_so
from lockstep.recipes.runs.run_log import RunLog

LOG = logging.getLogger("lockstep.some.module")


@pytest.fixture
def shown():
    return io.StringIO()


def console_log_to(shown: io.StringIO, silent_s: float = 60.0) -> ConsoleLog:
    return ConsoleLog(silent_s, Console(file=shown, soft_wrap=True))


def wait_for(condition, deadline_s: float = 10.0) -> None:
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_what_begins_is_a_line_and_what_is_for_the_log_is_not(shown):
    with console_log_to(shown):
        LOG.info("loading the model %s", "a/b")
        LOG.debug("importing torch")
        LOG.warning("a verifier failed")
        LOG.info("only for run.log", extra=IN_THE_LOG_ALONE)
        STEPS.info("rl 1/2  reward 0.5")
        LOG.info("long\n" + "x" * 500)
    LOG.info("after the command")
    lines = shown.getvalue().splitlines()
    assert lines[:2] == ["loading the model a/b", "warning: a verifier failed"]
    assert [len(line) for line in lines[2:]] == [160]


def test_a_warning_is_said_whole_in_lines(shown):
    with console_log_to(shown):
        LOG.warning("no response has an answer: %s say how to write it", "word " * 60)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= 160 for line in lines)
    assert len(lines) == 3
    assert lines[-1].endswith("say how to write it")


def test_what_takes_long_is_said_again_less_and_less_often(shown):
    with console_log_to(shown, silent_s=0.1):
        LOG.debug("importing torch and Megatron-core")
        wait_for(lambda: shown.getvalue().count("\n") >= 2)
        time.sleep(0.3)
    lines = shown.getvalue().splitlines()
    assert all(line.startswith("... importing torch and Megatron-core (") for line in lines)
    assert len(lines) <= 4  # after 0.1, 0.3, 0.7, ... seconds


def test_steps_are_said_by_their_own_lines(shown, monkeypatch):
    monkeypatch.setattr(console_log, "STEP_SILENT_S", 0.2)
    with console_log_to(shown, silent_s=0.05):
        for _ in range(10):
            STEPS.info("rl 1/2")
            time.sleep(0.03)
        assert shown.getvalue() == ""
        wait_for(lambda: "... the next step (" in shown.getvalue())


def test_the_first_compilation_of_a_kernel_is_said_once(shown):
    @numba.njit
    def twice(x):
        return x + x

    with console_log_to(shown), compilers_say_so():
        assert twice(np.float32(2)) == 4
        assert twice(np.int64(2)) == 4
    assert twice(np.int32(2)) == 4
    assert shown.getvalue() == "compiling CPU kernels (numba; slow the first time, then they are cached)\n"


def test_the_log_holds_versions_machine_steps_warnings_and_the_error(tmp_path):
    def run() -> None:
        with RunLog(tmp_path):
            LOG.info("loading the model")
            STEPS.info("rl 1/2  reward 0.5")
            warnings.warn("a library's warning", UserWarning, stacklevel=1)
            logging.getLogger("some.library").warning("and another")
            logging.getLogger("some.library").info("its chatter")
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError):
        run()
    with RunLog(tmp_path):
        LOG.info("resumed")
    text = (tmp_path / "run.log").read_text()
    for part in ("loading the model", "reward 0.5", "a library's warning", "and another", "a defect", "Traceback"):
        assert text.count(part) >= 1, part
    assert "its chatter" not in text
    assert text.count("lockstep 0.1.0, Python 3.") == 2
    assert text.count(machine.processor()) == 2
    assert text.index("a defect") < text.index("resumed")
    assert PACKAGE.level == logging.NOTSET


def test_a_cgroups_memory_counts(tmp_path, monkeypatch):
    """The smallest limit on the way up counts; the page cache does not; version 1 has other names."""
    for limit, use, stat, folder in (
        ("memory.max", "memory.current", "inactive_file 30\nanon 1\n", tmp_path),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 30\n", tmp_path / "memory"),
    ):
        monkeypatch.setattr(machine, "CGROUP", tmp_path)
        folder.mkdir(exist_ok=True)
        (folder / limit).write_text("1000\n")
        (folder / use).write_text("400\n")
        (folder / "memory.stat").write_text(stat)
        assert machine.memory_limit() == 1000
        assert machine.available_memory() == 630
        (folder / limit).unlink()
    assert machine.memory_limit() > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_memory() > 2**20


def test_progress_is_output_once_a_stage_runs_and_warnings_are_errors(capfd):
    with ConsoleLog() as log:
        LOG.info("before")
        log.is_running = True
        LOG.info("loading")
        LOG.warning("odd")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("loading\n", "before\nwarning: odd\n")
