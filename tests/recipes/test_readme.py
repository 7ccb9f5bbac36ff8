"""The README's own data and reward, as it is written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_a_jsonl_file_a_function_and_one_command_make_a_run(tmp_path):
    section = README.read_text(encoding="utf-8").split("## Your own data and reward")[1].split("\n## ")[0]
    make_data, command = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (function,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (file_name,) = re.findall(r"in `(\w+\.py)`", section)
    (tmp_path / file_name).write_text(function)
    # The installed command, of this interpreter and this tree.
    lockstep = tmp_path / "bin" / "lockstep"
    lockstep.parent.mkdir()
    lockstep.write_text(f'#!/bin/sh\nexec {sys.executable} -m lockstep.recipes.cli "$@"\n')
    lockstep.chmod(0o755)
    environment = {**os.environ, "PATH": f"{lockstep.parent}:{os.environ['PATH']}"}
    for script in (make_data, command):
        done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr.decode()

    run = tmp_path / "runs" / "rl"
    assert (run / "model" / "model.safetensors").exists()
    (last,) = [step for step in (run / "rollouts").glob("*.jsonl") if step.stem.endswith("3")]
    for line in last.read_text().splitlines():
        sample = json.loads(line)
        in_problem = re.fullmatch(r"problems/(\d+)", sample["problem_id"])
        a, b = divmod(int(in_problem[1]), 9)
        expected = float(str(a + b + 2) in sample["text"]) - 0.01 * len(sample["text"])
        assert sample["reward"] == expected
