"""What composes a config, prints it or refuses it imports none of the libraries that take seconds."""

import json
import subprocess
import sys

from lockstep.recipes.cli import STAGES

HEAVY = ("torch", "megatron", "transformers", "wandb", "ray", "triton", "numba")
# Runs commands one after the other and prints, of each, its exit code and what is imported by then.
MAIN = """
import contextlib, io, json, sys
from lockstep.recipes import cli
seen = []
for arguments in json.loads(sys.argv[1]):
    code = 0
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main(arguments)
        except SystemExit as exit:
            code = exit.code or 0
    seen.append([code, [name for name in {heavy} if name in sys.modules]])
print(json.dumps(seen))
"""


def imported_by(*commands: list[str]) -> list[list]:
    """[exit code, the heavy libraries imported by then] of each command, all in one process of their own."""
    command = [sys.executable, "-c", MAIN.format(heavy=HEAVY), json.dumps(commands)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def test_help_imports_no_heavy_library():
    seen = imported_by(["--help"], *([stage, "--help"] for stage in STAGES))
    assert dict(zip(("lockstep", *STAGES), seen, strict=True)) == {name: [0, []] for name in ("lockstep", *STAGES)}


def test_nor_does_a_config_that_is_printed_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = imported_by(
        ["rl", "recipe=demo", "--cfg", "job"],
        ["rl", "algorithm.nmae=grpo"],
        ["rl", "rollout.max_tokens=0"],
        ["sft", "run=no_such_run"],
        ["replay", "run=x", "cluster.kind=nowhere"],
    )
    assert seen == [[0, []], *[[2, []]] * 4]


def test_a_plan_needs_no_megatron():
    code = "import sys, lockstep.recipes.planning.plan\nprint('megatron' in sys.modules, 'wandb' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert process.stdout.split() == ["False", "False"]


def test_packages_offer_their_names_and_set_the_mode_of_matrix_products():
    code = """
import os, sys
import lockstep.engine, lockstep.trainer_bridge
assert os.environ["MKL_CBWR"] == "AUTO,STRICT" and "torch" not in sys.modules
from lockstep.engine import EngineConfig
from lockstep.trainer_bridge import TrainerConfig
EngineConfig(model="m"), TrainerConfig(model="m")
assert "torch" not in sys.modules
from lockstep.engine import Engine, ReplicatedEngine, RequestOutput, SamplingParams, TokenEvent
assert "torch" in sys.modules and not hasattr(lockstep.engine, "no_such_name")
"""
    environment = {"PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
