"""The command line: `lockstep STAGE [hydra overrides]`.

A stage is a module with a frozen dataclass config and `run(config)`, one line in STAGES and `configs/STAGE.yaml`. Hydra
composes the YAML over the dataclass's defaults; `--help`, `--cfg job`, `--info`, `--config-dir` are Hydra's own.
"""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lockstep.recipes import launch
from lockstep.recipes.runs.console_log import ConsoleLog, compilers_say_so
from lockstep.recipes.user_errors import as_user_error

_LOG = logging.getLogger("lockstep.recipes.cli")  # by its name: this module may run as __main__
USAGE_ERROR = 2
INTERRUPTED = 130  # as shells say it: 128 and the signal's number
TERMINATED = 143
BROKEN_PIPE = 141


class Terminated(KeyboardInterrupt):
    """SIGTERM: of a scheduler or a container that ends the command."""


@dataclass(frozen=True)
class Stage:
    """`config` and `run` are "module:name".

    The config's module is imported when the stage is chosen, and must not import torch: help and a misspelt key do not
    wait for it. That of `run` is imported when there is a config to run.
    """

    config: str
    run: str
    summary: str
    resumes: bool = False  # run=DIR takes the config that the directory holds


STAGES: Mapping[str, Stage] = {
    "sft": Stage(
        "lockstep.recipes.rl.config:SFTConfig",
        "lockstep.recipes.rl.sft:run",
        "supervised fine-tuning",
        resumes=True,
    ),
    "rl": Stage(
        "lockstep.recipes.rl.config:RLConfig",
        "lockstep.recipes.rl.rl:run",
        "reinforcement learning from rewards",
        resumes=True,
    ),
    "reward": Stage(
        "lockstep.recipes.rl.config:RewardConfig",
        "lockstep.recipes.reward:run",
        "a reward model from preference pairs",
        resumes=True,
    ),
    "draft": Stage(
        "lockstep.recipes.drafts.config:DraftConfig",
        "lockstep.recipes.drafts.draft:run",
        "an EAGLE-3 draft for a model, offline",
        resumes=True,
    ),
    "eval": Stage(
        "lockstep.recipes.evaluation.config:EvalConfig",
        "lockstep.recipes.evaluation.evaluate:run",
        "accuracy on held-out tasks",
    ),
    "replay": Stage(
        "lockstep.recipes.evaluation.config:ReplayConfig",
        "lockstep.recipes.rl.replay:main",
        "stored rollouts again, compared by bit",
    ),
    "convert": Stage(
        "lockstep.recipes.conversion.config:ConvertConfig",
        "lockstep.recipes.conversion.convert:run",
        "checkpoint to HF format",
    ),
    "bench": Stage(
        "lockstep.recipes.bench.config:BenchConfig",
        "lockstep.recipes.bench.stage:run",
        "speed of engine, trainer, kernels",
    ),
}

# What `--dry-run` imports in the place of a stage's `run`: a plan needs neither Megatron-core nor an engine.
PLANS: Mapping[str, str] = {
    "lockstep.recipes.rl.sft:run": "lockstep.recipes.planning.plan:plan_sft",
    "lockstep.recipes.rl.rl:run": "lockstep.recipes.planning.plan:plan_rl",
}

# What OmegaConf says of a value that stands for a list in a YAML file.
NOT_A_LIST = re.compile(r"\w+ is not a ListConfig, list or tuple\.?")
# What else Hydra and OmegaConf say in words of their own, and in ours.
IN_OUR_WORDS = (
    (NOT_A_LIST, "one value is not a list: write [VALUE]"),
    (re.compile(r"field '.*' is not Optional"), "it cannot be null: leave it out"),
    (
        re.compile(r"Invalid type assigned: .*"),
        "it is a section: set its keys, or the whole as {KEY: VALUE}",
    ),
    (re.compile(r"Cannot merge DictConfig with ListConfig"), "it is no list: write {NAME: VALUE}"),
    (
        re.compile(r"Config group override must be .* Got NoneType"),
        "task, cluster and recipe cannot be null: leave them out",
    ),
)
SEVERAL_VALUES = re.compile(r"Ambiguous value for argument '([^=]*)=(.*)'")

HELP_TEMPLATE = """\
lockstep $stage: $summary

Usage: lockstep $stage [KEY=VALUE ...]

== Config (KEY=VALUE sets a value, e.g. a.b=3) ==
$$CONFIG
== Groups (GROUP=OPTION takes configs/GROUP/OPTION.yaml; --config-dir DIR adds your own) ==
$$APP_CONFIG_GROUPS
--dry-run prints a training stage's plan.
--cfg job prints the composed config, --info says where it comes from, --hydra-help lists the other flags.
"""


def main(argv: list[str] | None = None, stages: Mapping[str, Stage] = STAGES) -> None:
    """Run the stage that argv (default: the process's arguments) names. Exits with 2 on a user's error."""
    try:
        try:
            _choose(sys.argv[1:] if argv is None else argv, stages)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # who read it has gone (`| head`): nothing is left to say, nor anyone to say it to
        launch.drop_output()
        sys.exit(BROKEN_PIPE)


def _choose(arguments: list[str], stages: Mapping[str, Stage]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_help(stages)
    elif {"-V", "--version"} & {arguments[0], *(arguments[1:] if arguments[0] in stages else ())}:
        print(f"lockstep {importlib.metadata.version('lockstep-rl')}")
    elif arguments[0] not in stages:
        if arguments[0].startswith("-") or "=" in arguments[0]:
            _fail(f"{arguments[0]} stands before the stage: lockstep STAGE KEY=VALUE", f"stages: {' '.join(stages)}")
        near = difflib.get_close_matches(arguments[0].lower(), stages, cutoff=0.5)
        _fail(
            f"unknown stage {arguments[0]!r}",
            near and f"did you mean: {', '.join(near)}",
            f"stages: {' '.join(stages)}",
        )
    elif {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        _fail("--multirun is not supported: a run directory holds one run, so start one run per setting")
    else:
        _run_stage(arguments[0], stages[arguments[0]], arguments[1:])


def _run_stage(name: str, stage: Stage, arguments: list[str]) -> None:
    full_errors = launch.full_errors_asked()
    with ConsoleLog() as console_log, _ended_by_sigterm():
        with _user_errors(full_errors):
            launch.check_machine()
            _LOG.debug("composing the config")
            config = _compose(name, stage, _resolve(stage.config), arguments)
            if config is None:
                return
            launch.prepare_environment()
            plan = PLANS.get(stage.run) if getattr(config, "dry_run", False) else None
            _LOG.debug("importing what plans a run" if plan else "importing torch and Megatron-core")
            run = _resolve(plan or stage.run)
        with _user_errors(full_errors, "(HYDRA_FULL_ERROR=1 shows where)"), compilers_say_so():
            console_log.is_running = True
            _remove_what_killed_runs_left()
            _LOG.debug("starting lockstep %s", name)
            run(config)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the command as Ctrl-C does: what is open is closed. A second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may set this
        return
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:  # a child that was forked has nothing to close
            os.kill(os.getpid(), number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _user_errors(full_errors: bool, *details: str) -> Iterator[None]:
    """A user's error is a line and exit code 2; see user_errors. A defect keeps its traceback."""
    try:
        yield
    except Terminated:
        _fail("ended by SIGTERM", exit_code=TERMINATED)
    except KeyboardInterrupt:
        _fail("interrupted", exit_code=INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:
        lines = None if full_errors else as_user_error(error)
        if lines is None:
            raise
        _fail(*lines, *details)


def _compose(name: str, stage: Stage, config_class: type, arguments: list[str]) -> Any:
    """The stage's config, or None where a flag such as --cfg asked Hydra to print instead.

    Raises:
        ValueError: what Hydra or OmegaConf refused, in one message that names the key.
    """
    import hydra  # here and not above: 0.4 s that `lockstep --help` need not wait
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from lockstep.recipes import config_schema, overrides
    from lockstep.recipes.runs import run_config

    composed = []

    def keep(config: Any) -> None:
        composed.append((config, list(HydraConfig.get().overrides.task)))

    _register(name, stage, config_schema.mirror(config_class))
    arguments_before = sys.argv
    arguments = overrides.flags_first(name, arguments, config_class)
    read = [config_schema.read_override(config_class, argument) for argument in arguments]
    sys.argv = [f"lockstep {name}", *read]  # hydra.main reads its arguments there
    try:
        with launch.hydra_raises():
            hydra.main(version_base="1.3", config_path="pkg://lockstep.configs", config_name=name)(keep)()
    except Exception as error:  # of many classes: OmegaConf has plain assertions where a null group is set key by key
        raise ValueError(_explain(error, list(config_schema.keys(config_class)))) from error
    finally:
        sys.argv = arguments_before
    # The stage itself runs after Hydra has returned, so that its tracebacks are its own.
    if not composed:
        return None
    config, task_overrides = composed[0]
    if stage.resumes and config.run is not None:
        given = OmegaConf.to_container(config, resolve=True)
        return run_config.resumed_from_plain(config_class, given, set(run_config.keys_of_overrides(task_overrides)))
    return config_schema.build(config_class, config)


def _register(name: str, stage: Stage, schema: type) -> None:
    """Give Hydra the stage's schema as NAME_schema, and its own settings: no output directory, no logging set-up."""
    from hydra.conf import HydraConf, RunDir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    template = HELP_TEMPLATE.replace("$stage", name).replace("$summary", stage.summary).replace("$$", "$")
    hydra_config = HydraConf(run=RunDir(dir="."), output_subdir=None)
    quiet = {"hydra_logging": "none", "job_logging": "none", "help": "lockstep"}
    hydra_config.defaults = [
        {group: quiet.get(group, option)} for entry in hydra_config.defaults for group, option in entry.items()
    ]
    store = ConfigStore.instance()
    node = OmegaConf.structured(schema)
    _open_mappings(node)
    store.store(name=f"{name}_schema", node=node, provider="lockstep")
    store.store(group="hydra", name="config", node=hydra_config, provider="lockstep")
    store.store(
        group="hydra/help",
        name="lockstep",
        node={"app_name": f"lockstep {name}", "header": stage.summary, "footer": "", "template": template},
        provider="lockstep",
    )


def _open_mappings(node: Any) -> None:
    """Let mappings (unlike dataclasses, whose keys are fixed) take new keys: `reward={correct: 1.0}` without a `+`."""
    from omegaconf import DictConfig, OmegaConf

    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            if dataclasses.is_dataclass(child._metadata.object_type):
                _open_mappings(child)
            else:
                OmegaConf.set_struct(child, False)


def _explain(error: Exception, known_keys: list[str]) -> str:
    """One message for a Hydra or OmegaConf error: where, which key, and near matches if the key is unknown."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    from lockstep.recipes import config_schema

    message = str(error)
    if isinstance(error, MissingConfigException):
        options = f"\noptions: {', '.join(error.options)}" if error.options else ""
        return message.partition("\n")[0] + options
    for cause in _causes(error):
        if key := getattr(cause, "full_key", None):
            where = message.partition(":")[0] + ": " if message.startswith("In '") else ""
            if isinstance(cause, ConfigKeyError | ConfigAttributeError):
                return where + config_schema.unknown_key_message(key, known_keys)
            return f"{where}{key}: {_in_our_words(str(cause).partition(chr(10))[0])}"
    if isinstance(error, AssertionError):
        return f"a group that is null cannot be set key by key: set it in a YAML file ({message})"
    if several := SEVERAL_VALUES.match(message):
        key, values = several.groups()
        return f"{key}={values} is several values: a list is {key}=[{values}], a text stands in quotes of its own"
    return _in_our_words(message)


def _in_our_words(message: str) -> str:
    for pattern, words in IN_OUR_WORDS:
        message = pattern.sub(lambda _, words=words: words, message)
    return message


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _remove_what_killed_runs_left() -> None:
    remove_left = _resolve("lockstep.engine.owned_folder:remove_left")
    remove_left(Path(tempfile.gettempdir()), _resolve("lockstep.rollout.rewards.isolated_main:remove_tree"))


def _print_help(stages: Mapping[str, Stage]) -> None:
    lines = ["Usage: lockstep STAGE [KEY=VALUE ...]", "", "Stages:"]
    lines += [f"  {name:<8} {stage.summary}" for name, stage in stages.items()]
    lines += [
        "",
        "lockstep STAGE --help     the stage's config, with every key and its default",
        "lockstep STAGE --cfg job  the config that these overrides give, without running it",
        "lockstep rl --dry-run     the plan of a run, with its arithmetic of memory and batches (sft too)",
        "lockstep --version        the version",
        "",
        "HYDRA_FULL_ERROR=1 in the environment gives tracebacks in place of one-line errors.",
    ]
    print("\n".join(lines))


def _fail(message: str, *details: str, exit_code: int = USAGE_ERROR) -> None:
    """Print the message and its details to stderr, and exit."""
    first, *rest = [message, *filter(None, details)]
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[bold red]error:[/] {escape(first)}")
    for line in rest:
        console.print(escape(line))
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
