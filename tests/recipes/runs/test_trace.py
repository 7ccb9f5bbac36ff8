"""The timeline: whole JSON at any moment, spans where they were, and one file for a run and its resumptions."""

import json
import os
import threading
import time

import pytest

from lockstep.recipes.runs.trace import Trace


def events(path, phase: str) -> list[dict]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == phase]


def test_the_file_is_whole_after_every_event(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path, "rl")
    for number in range(5):
        trace.add("train", number, number + 0.5, step=number)
        trace.counter("reward", number / 2)
        assert [event["args"]["step"] for event in events(path, "X")] == list(range(number + 1))
        assert [event["args"]["value"] for event in events(path, "C")] == [n / 2 for n in range(number + 1)]


def test_spans_are_where_they_were_and_on_their_tracks(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path, "rl")
    before = time.time()
    with trace.span("outer", step=3):
        with trace.span("rollout", track="engine"):
            time.sleep(0.02)
        time.sleep(0.01)
    with pytest.raises(KeyError), trace.span("failed"):
        raise KeyError
    trace.close()
    inner, outer, failed = events(path, "X")
    assert (inner["name"], outer["name"], failed["name"]) == ("rollout", "outer", "failed")
    assert outer["args"] == {"step": 3}
    assert abs(outer["ts"] / 1e6 - before) < 1.0
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1
    assert inner["dur"] >= 20_000
    assert outer["dur"] >= inner["dur"] + 9_000
    names = {event["tid"]: event["args"]["name"] for event in events(path, "M") if event["name"] == "thread_name"}
    assert (names[inner["tid"]], names[outer["tid"]]) == ("engine", "run")
    assert {event["pid"] for event in events(path, "X")} == {os.getpid()}


@pytest.mark.parametrize("torn", [0, 1, 2, 40])
def test_a_resumed_run_goes_on_in_the_same_file(tmp_path, torn):
    """Also where the machine went down in the middle of a write: what is torn is left out."""
    path = tmp_path / "trace.json"
    trace = Trace(path, "rl")
    trace.add("first", 0.0, 1.0)
    trace.add("second", 1.0, 2.0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - torn])
    Trace(path, "rl").add("third", 2.0, 3.0)
    kept = ["first", "third"] if torn > 3 else ["first", "second", "third"]
    assert [event["name"] for event in events(path, "X")] == kept
    assert len([event for event in events(path, "M") if event["name"] == "process_name"]) == 2


def test_threads_share_a_trace(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path, "rl")
    threads = [
        threading.Thread(target=lambda t=t: [trace.add(f"{t}", 0.0, 1.0, track=str(t)) for _ in range(50)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(event["name"] for event in events(path, "X")) == sorted(f"{t}" for t in range(4) for _ in range(50))
