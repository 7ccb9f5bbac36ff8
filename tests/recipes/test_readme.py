"""The README's own data and reward, as it is written there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from lockstep.recipes import cli

README = Path(__file__).resolve().parents[2] / "README.md"


def test_a_jsonl_file_a_function_and_one_command_make_a_run(tmp_path, monkeypatch):
    section = README.read_text(encoding="utf-8").split("## Your own data and reward")[1].split("\n## ")[0]
    make_data, command = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (function,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (file_name,) = re.findall(r"in `(\w+\.py)`", section)
    (tmp_path / file_name).write_text(function)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    subprocess.run(["sh", "-ec", make_data], check=True, timeout=60)
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "lockstep"
    cli.main(arguments)

    run = tmp_path / "runs" / "sums"
    assert (run / "model" / "model.safetensors").exists()
    (last,) = [step for step in (run / "rollouts").glob("*.jsonl") if step.stem.endswith("3")]
    for line in last.read_text().splitlines():
        sample = json.loads(line)
        in_problem = re.fullmatch(r"problems/(\d+)", sample["problem_id"])
        a, b = divmod(int(in_problem[1]), 9)
        expected = float(str(a + b + 2) in sample["text"]) - 0.01 * len(sample["text"])
        assert sample["reward"] == expected
