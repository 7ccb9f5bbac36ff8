"""Lockstep: reinforcement learning of language models with an engine and a trainer that agree to the bit.

The packages beside this one in the repository are installed below it: `lockstep.engine`, `lockstep.trainer_bridge`, ...
"""

from pathlib import Path

__version__ = "0.1.0"

# Python at the root of a clone finds this folder before an installed `lockstep`: the packages are beside it there.
_ROOT = Path(__file__).resolve().parents[1]
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "trainer_bridge").is_dir():
    __path__.append(str(_ROOT))
