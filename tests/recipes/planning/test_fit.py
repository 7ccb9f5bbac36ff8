"""The dry run's verdict on memory: against what a run takes, and against a machine that has too little."""

import subprocess
import sys

import pytest

from lockstep.recipes import cli
from lockstep.recipes.planning.fit import PROCESS_BYTES, Fit, gpu_fit, host_fit, size
from lockstep.recipes.planning.memory import ACTIVATIONS, OPTIMIZER, Item
from lockstep.recipes.runs import machine

MB = 2**20
SHAPE = ("num_layers=2", "hidden_size=256", "head_dim=64", "ffn_hidden_size=768", "vocab_size=49152")
SFT = ["sft", "steps=2", "examples_per_step=8", *(f"model.shape.{part}" for part in SHAPE)]
TRAINER = [Item("weights", 100 * MB, ""), Item(OPTIMIZER, 200 * MB, ""), Item(ACTIVATIONS, 50 * MB, "")]
ENGINE = [Item("weights", 100 * MB, ""), Item("KV cache", 10 * MB, "")]


def test_the_parts_of_one_process():
    fit = host_fit([TRAINER], ENGINE, ranks=1, engines=1, others=0)
    assert fit.needed == PROCESS_BYTES + (300 + 200 + 110) * MB  # a checkpoint being written, no activations
    busy = [*TRAINER[:2], Item(ACTIVATIONS, 900 * MB, "")]
    assert host_fit([busy], ENGINE, ranks=1, engines=1, others=0).needed == PROCESS_BYTES + (300 + 900 + 110) * MB
    assert host_fit([TRAINER], [], ranks=1, engines=0, others=0).needed == PROCESS_BYTES + 500 * MB
    critic = host_fit([TRAINER, TRAINER], ENGINE, ranks=1, engines=1, others=0)
    assert critic.needed == PROCESS_BYTES + (600 + 400 + 110) * MB


def test_every_process_of_a_ray_cluster_counts():
    fit = host_fit([TRAINER], ENGINE, ranks=2, engines=3, others=1)
    assert fit.needed == 6 * PROCESS_BYTES + (2 * 500 + 3 * 110) * MB


def test_the_verdict():
    assert Fit("here", 5, 5, "").verdict == "fits"
    assert Fit("here", 6 * MB, 5 * MB, "").problem == "it does not fit: 6 MiB are needed in here, which has 5 MiB left"
    unknown = gpu_fit("cuda:1", [TRAINER])
    if unknown.available is None:
        assert (unknown.verdict, unknown.problem) == ("not known here", None)
    assert [size(n) for n in (3, 2048, 3 * MB, 5 * 2**30)] == ["3 B", "2 KiB", "3 MiB", "5.0 GiB"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_machine_with_too_little_memory_is_told(folder, capfd, monkeypatch, stage):
    cli.main([stage, *SFT[3:], "--dry-run"])
    assert "fits" in capfd.readouterr().out
    monkeypatch.setattr(machine, "available_memory", lambda: 700 * MB)
    with pytest.raises(SystemExit) as exit_info:
        cli.main([stage, *SFT[3:], "--dry-run"])
    assert exit_info.value.code == 2
    shown = capfd.readouterr()
    assert "does not fit" in shown.out
    assert "are needed in this machine's memory, which has 700 MiB left" in shown.err


def test_a_run_takes_what_was_said(folder, capfd):
    """At most a tenth more, and not much less."""
    cli.main([*SFT, "--dry-run"])
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.strip().startswith("fits")]
    number, unit = line.split()[1:3]
    predicted = float(number) * {"GiB": 1024, "MiB": 1}[unit]
    program = (
        "import sys; from lockstep.recipes.cli import main; main(sys.argv[1:])\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *SFT], capture_output=True, text=True, check=True, timeout=300
    )
    measured = int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024
    assert 0.75 * predicted < measured < 1.1 * predicted, (measured, predicted)
