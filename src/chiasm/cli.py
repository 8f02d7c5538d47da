"""The command line: flags -> settings -> verb. No logic lives here, and torch is not imported before a verb runs.

The flags of a verb are the fields of its dataclass in `chiasm.config`; this file only turns one into the other.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from chiasm import __version__
from chiasm.config import (
    RECIPES,
    BenchConfig,
    CompareConfig,
    Config,
    DataConfig,
    DemoConfig,
    DescribeConfig,
    EvaluateConfig,
    ExplainConfig,
    ModelsConfig,
    PredictConfig,
    ServeConfig,
    TrainConfig,
    WeightsConfig,
    default_of,
    read_yaml,
)
from chiasm.errors import ChiasmError, UnknownNameError, nearest

# verb on the command line -> (settings, function in chiasm.verbs.<verb>)
VERBS: dict[str, tuple[type[Config], str]] = {
    "train": (TrainConfig, "train"),
    "compare": (CompareConfig, "compare"),
    "evaluate": (EvaluateConfig, "evaluate"),
    "predict": (PredictConfig, "predict"),
    "explain": (ExplainConfig, "explain"),
    "serve": (ServeConfig, "serve"),
    "describe": (DescribeConfig, "describe"),
    "data": (DataConfig, "check_data"),
    "models": (ModelsConfig, "models"),
    "weights": (WeightsConfig, "weights"),
    "bench": (BenchConfig, "bench"),
    "demo": (DemoConfig, "demo"),
}

# What these ask memory for is of the same sizes step by step; and of sizes that vary with the images.
KEEP_ALL, KEEP_SOME = ("train", "compare", "demo"), ("predict", "evaluate", "explain")

HELP = f"""chiasm {__version__}: vision models that join convolution and self-attention.

usage: chiasm VERB ...

{{verbs}}

A MODEL is a model file, a run folder or an architecture's name.
'chiasm VERB --help' lists a verb's settings, '--print-config' shows them in full, '--config FILE' reads them from YAML.
"""


class _Parser(ArgumentParser):
    """An argument parser that tells a mistake in one line and suggests the nearest choice."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = " ".join(message.split()).rstrip(".")
        if stray := re.match(r"Unrecognized arguments: (.*)", message, re.IGNORECASE):
            message = f"'{stray[1]}' is out of place: what goes without a flag stands together, before the options"
        if wrong := re.match(r'Parser key "(\w+)"(?: element \d+)?: Expected an? (.*)\. Got value: (.*)', message):
            key, kind, value = wrong.groups()
            flag = f"--{key.replace('_', '-')}"
            if choices := re.search(r"Literal\[(.*)\]", kind):
                raise UnknownNameError(flag, value, choices[1].replace("'", "").split(", "), f"One of {choices[1]}.")
            kind = re.sub(r"<class '(\w+)'>", r"\1", kind).replace("typing.", "")
            message = f"{flag}: expected {kind}, saw '{value}'"
        raise ChiasmError(f"{message}. See '{self.prog} --help'.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 fine, 1 done with exceptions, 2 misuse, 3 training failed)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except ChiasmError as error:
        print(f"chiasm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("chiasm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (`| head`): point stdout elsewhere so that Python's last flush stays quiet too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, no permission: the system's own words say it best
        print(f"chiasm: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:<10}{_summary(config)}" for verb, (config, _) in VERBS.items())
        print(HELP.format(verbs=verbs), end="")
        return 0
    if argv[0] == "--version":
        print(f"chiasm {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UnknownNameError("verb", verb, VERBS, "See 'chiasm --help'.")
    config_class, function = VERBS[verb]
    flags = _parse(verb, config_class, rest)
    if flags is None:
        return 0
    try:
        config = config_class.from_flags(**flags)  # refuse what is missing before torch is imported
    except ChiasmError as error:
        given = [f"--{name.replace('_', '-')}" for name in _lists(config_class) if flags.get(name)]
        if not given:
            raise
        raise ChiasmError(f"{error} {given[-1]} takes all words that follow it: put it last.") from error
    # Pillow warns of every damaged tag, tens of thousands in one file; what cannot be read is told by the verb.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if verb in (*KEEP_ALL, *KEEP_SOME):
        from chiasm.data.machine import ALL, SPARE, keep_freed_memory

        keep_freed_memory(ALL if verb in KEEP_ALL else SPARE)
    module = import_module(f"chiasm.verbs.{verb}")
    return module.show(getattr(module, function)(**flags), config)


def _summary(config: type[Config]) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]


def _parse(verb: str, config_class: type[Config], argv: list[str]) -> dict[str, Any] | None:
    """The settings that were given on the command line or in a YAML file; None when only help was asked for."""
    parser = _parser(verb, config_class)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    _check_options(verb, config_class, argv)
    given = vars(parser.parse_args(argv, defaults=False))
    print_config = given.pop("print_config", False)
    path = given.pop("config", None)
    # A positional that was not given stands here as None; of the others only those given do, 'null' among their values.
    open_ = _open(config_class)
    flags = {key: value for key, value in given.items() if value is not None or key not in open_}
    if path:
        flags = _read_settings(path, parser, config_class) | flags
    if print_config:
        config = config_class.from_flags(**dict.fromkeys(open_, "-") | flags)
        print(config.to_yaml(without=[name for name in open_ if name not in flags]), end="")
        return None
    return flags


def _open(config_class: type[Config]) -> list[str]:
    """The settings for which null means that they were not given."""
    return [f.name for f in fields(config_class) if f.metadata.get("positional") or default_of(f) is MISSING]


def _lists(config_class: type[Config]) -> list[str]:
    """The options that take several words."""
    hints = get_type_hints(config_class)
    return [
        f.name for f in fields(config_class) if get_origin(hints[f.name]) is list and not f.metadata.get("positional")
    ]


def _read_settings(path: str, parser: ArgumentParser, config_class: type[Config]) -> dict[str, Any]:
    """The settings of a YAML file, checked against the same types as the flags."""
    content = read_yaml(path)
    names = [f.name for f in fields(config_class)]
    for name in content:
        if name not in names:
            raise UnknownNameError("option", str(name), names, f"It stands in {path}.")
    content = {name: value for name, value in content.items() if value is not None or name not in _open(config_class)}
    try:
        return vars(parser.parse_object(content, defaults=False))
    except ChiasmError as error:
        raise ChiasmError(f"{path}: {error}") from error


def _parser(verb: str, config_class: type[Config]) -> ArgumentParser:
    parser = _Parser(prog=f"chiasm {verb}", description=_summary(config_class), default_env=False)
    hints = get_type_hints(config_class)
    for item in fields(config_class):
        default, kind = default_of(item), hints[item.name]
        many = get_origin(kind) is list
        options: dict[str, Any] = {"help": item.metadata["help"].replace("%", "%%")}
        if default is not MISSING:
            options["default"] = default
        if item.metadata.get("positional"):
            # Never required by the parser: --print-config and --config do without; Config.from_flags asks for it.
            options |= {"nargs": "*" if many else "?", "type": get_args(kind)[0] if many else kind}
            parser.add_argument(item.name, metavar=item.name.upper(), **options)
        elif kind is bool:
            parser.add_argument(f"--{item.name.replace('_', '-')}", action=ActionYesNo(no_prefix="no-"), **options)
        elif many:
            parser.add_argument(f"--{item.name.replace('_', '-')}", nargs="*", type=get_args(kind)[0], **options)
        else:
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, **options)
    parser.add_argument(
        "--config", type=str, metavar="FILE", help="read settings from this YAML file; flags win over it"
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML and stop")
    if config_class is TrainConfig:
        parser.epilog = f"Recipes: {', '.join(RECIPES)}; 'chiasm train --recipe NAME --print-config' shows one in full."
    return parser


def _check_options(verb: str, config_class: type[Config], argv: list[str]) -> None:
    """Refuse an unknown option with the nearest one, before the parser gives its own long usage text."""
    known = {"config", "print-config", "help"}
    for item in fields(config_class):
        if not item.metadata.get("positional"):
            name = item.name.replace("_", "-")
            known |= {name, f"no-{name}"} if isinstance(default_of(item), bool) else {name}
    for word in argv:
        name = word[2:].split("=")[0]
        if word.startswith("--") and name and name not in known:
            near = nearest(name, known) or get_close_matches(name.split("-")[0], known)
            hint = f"; did you mean {' or '.join('--' + n for n in near)}?" if near else "."
            raise ChiasmError(f"unknown option '--{name}'{hint} See 'chiasm {verb} --help'.")
