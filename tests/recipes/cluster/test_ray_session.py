"""A Ray cluster of a run's own: beside any other, with files and a store of its own, and not missed when it is gone."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from lockstep.engine import EngineConfig
from lockstep.recipes import launch
from lockstep.recipes.cluster.weights_folder import WeightsFolder
from lockstep.recipes.runs.run_inputs import with_absolute_paths
from lockstep.trainer_bridge import TrainerConfig

pytest.importorskip("ray")
from lockstep.recipes.cluster.actors import TrainerActor, connect

PROGRAM = """
import os, sys
import psutil, ray
from lockstep.recipes.cluster.config import ClusterConfig
from lockstep.recipes.cluster.ray_session import RaySession

session = RaySession(ClusterConfig(kind="ray"))
assert session.directory.stat().st_mode & 0o077 == 0
assert session.head_answers
print(session.directory)

@ray.remote(num_cpus=0)
def seen():
    import helper_beside
    return os.umask(0), os.environ["GLOO_SOCKET_IFNAME"], helper_beside.VALUE

assert ray.get(seen.remote(), timeout=120) == (0o077, "lo", 3)
assert os.umask(0o022) == 0o022
(head,) = [child for child in psutil.Process().children(recursive=True) if child.name() == "gcs_server"]
head.kill()
head.wait(20)
assert not session.head_answers
session.abandon()
print("the run's last word")
if sys.argv[1:] == ["fail"]:
    raise RuntimeError("after the run")
"""


@pytest.mark.timeout(300)
def test_an_own_cluster_is_beside_any_other_and_its_death_after_a_run_ends_no_run(tmp_path):
    (tmp_path / "helper_beside.py").write_text("VALUE = 3\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("the run's last word\n")
    assert "Ray's head is gone" in result.stderr
    directory = result.stdout.splitlines()[0]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if directory in command], "processes were left behind"


def test_the_store_of_one_machine_is_a_file_and_that_of_several_listens_on_one_address(tmp_path):
    actor, before = TrainerActor(0, 1, seed=0, num_threads=1), set(listeners())
    address = actor.open_store(tmp_path)
    assert set(listeners()) == before
    connect(address, 5.0).set("key", "value")
    assert actor._store.get("key") == b"value"
    host, port, token = actor.open_store(None)
    assert [(c.ip, c.port) for c in set(listeners()) - before] == [(host, port)]
    assert host not in ("", "0.0.0.0", "::")
    connect((host, port, token), 5.0).set("key", "secret")
    assert actor._store.get("key") == b"secret"
    stranger = dist.TCPStore(host, port, is_master=False)
    assert not stranger.check(["key"])
    assert not connect((host, port, "guess"), 5.0).check(["key"])


def test_a_trainer_of_one_process_listens_on_the_loopback_alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(launch, "ENVIRONMENT_DEFAULTS", {})
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launch.prepare_environment()
    before = set(listeners())
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
    assert {address.ip for address in set(listeners()) - before} <= {"127.0.0.1"}
    del group
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # ranks of torchrun may be on several machines
    launch.prepare_environment()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def listeners():
    return [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]


def test_the_folder_of_weight_updates_is_a_run_s_own_and_goes_with_it(tmp_path):
    first, second = WeightsFolder(tmp_path / "shared"), WeightsFolder(tmp_path / "shared")
    assert first.path != second.path
    assert first.path.stat().st_mode & 0o077 == 0
    (first.path / "weights-1").mkdir()
    second._owned._closing.detach()
    second._owned._lock.close()  # as at a kill: its folder is left
    (tmp_path / "shared" / "lockstep-weights-mine").mkdir()
    third = WeightsFolder(tmp_path / "shared")
    assert not second.path.exists()
    assert (first.path / "weights-1").exists()
    first.close()
    third.close()
    assert os.listdir(tmp_path / "shared") == ["lockstep-weights-mine"]


def test_paths_are_absolute_for_processes_in_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "draft"):
        Path(name).mkdir()
        Path(name, "config.json").touch()
    Path("rewards").mkdir()
    Path("rewards/mine.py").touch()
    Path("schema.json").touch()
    here = str(tmp_path)
    engine = with_absolute_paths(EngineConfig(model="model", draft_model="draft", num_draft_tokens=1))
    assert (engine.model, engine.draft_model) == (f"{here}/model", f"{here}/draft")
    assert with_absolute_paths(replace(engine, draft_model="ngram")).draft_model == "ngram"
    assert with_absolute_paths(TrainerConfig(model="model", reference_model="draft")).reference_model == f"{here}/draft"
    terms = {
        "rewards/mine.py:score": 1.0,
        "correct": 1.0,
        "a.b": 2,
        "s": {"kind": "json_schema", "schema_file": "schema.json"},
    }
    assert with_absolute_paths(terms) == {
        f"{here}/rewards/mine.py:score": 1.0,
        "correct": 1.0,
        "a.b": 2,
        "s": {"kind": "json_schema", "schema_file": f"{here}/schema.json"},
    }
    assert with_absolute_paths("rewards/mine.py:score") == f"{here}/rewards/mine.py:score"
