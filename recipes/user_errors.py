"""Which exceptions are a user's error, and the line that says so; all others are defects and keep their traceback.

A user's error is what the config, the command line, files or this machine cause:

    ValueError                     the project's own way to refuse something
    OSError of a file or machine   it names a file, or its number is of a full disk, a port in use, a limit reached
    ImportError of other packages  one is not installed, or has another version than the one that is needed
    memory, ports, damaged files   classes of libraries, by name, so that none is imported here
"""

import errno
import os
from collections.abc import Mapping

EXTRAS: Mapping[str, str] = {"ray": "ray", "wandb": "sinks", "tensorboard": "sinks"}
# Numbers of errors that the machine causes, whatever the file.
_OF_THE_MACHINE = {
    errno.ENOSPC: "the disk is full: free some space, or choose another place (runs_dir=DIR, output=FILE)",
    errno.EDQUOT: "the disk quota is reached: free some space, or choose another place (runs_dir=DIR, output=FILE)",
    errno.EROFS: "it is on a file system that cannot be written: choose another place (runs_dir=DIR, output=FILE)",
    errno.EADDRINUSE: "another program uses this port: end that one, or choose another port",
    errno.EADDRNOTAVAIL: "this machine does not have the address",
    errno.EMFILE: "too many files are open in this process: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "this machine is out of memory: `--dry-run` says what a run needs",
}
# Classes of libraries, by name: what to do.
_OF_LIBRARIES = {
    "OutOfMemoryError": "`--dry-run` says what a run needs; smaller: trainer.max_tokens_per_micro_batch, "
    "engine.kv_cache_tokens, engine.memory_fraction",
    "MemoryError": "this machine is out of memory: `--dry-run` says what a run needs",
    "DistNetworkError": "processes could not connect: is the port in use, or the address of another machine?",
    "SafetensorError": "a safetensors file is damaged or incomplete: copy or download it again",
    "UsageError": "this is from wandb; WANDB_MODE=offline keeps its files in the run directory and asks nobody",
    "YAMLError": "a YAML file is damaged, or not written as YAML",
}


def as_user_error(error: BaseException) -> list[str] | None:
    """The message's lines, of which the first says what is wrong; None: it is a defect."""
    error = getattr(error, "cause", None) or error  # Ray's wrapper of what an actor raised, with its whole traceback
    if isinstance(error, ValueError):
        return _lines(str(error) or type(error).__name__)
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, ImportError):
        return _import_error(error)
    for name in (base.__name__ for base in type(error).__mro__):
        if name in _OF_LIBRARIES:
            return [*_lines(str(error) or name), _OF_LIBRARIES[name]]
    return None


def _os_error(error: OSError) -> list[str] | None:
    if isinstance(error, ConnectionError | ChildProcessError | ProcessLookupError | InterruptedError):
        return None
    if error.errno is None:
        # Made without a number: transformers', huggingface_hub's and our own, whose message is for people.
        return _lines(str(error))
    names = [
        os.fspath(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)
    ]
    where = " -> ".join(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)
    advice = _OF_THE_MACHINE.get(error.errno)
    if not where and advice is None:
        return None
    reason = error.strerror or type(error).__name__
    if reason == os.strerror(error.errno):
        reason = reason[0].lower() + reason[1:]
    return [f"{where}: {reason}" if where else reason, *([advice] if advice else [])]


def _import_error(error: ImportError) -> list[str] | None:
    package = (error.name or "").partition(".")[0]
    if package in ("", "lockstep"):
        return None
    if not isinstance(error, ModuleNotFoundError):
        return _lines(str(error))
    extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
    return [f"the package {package!r} is not installed here: pip install 'lockstep-rl{extra}'"]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]
