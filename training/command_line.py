"""COMMAND LINE: a frozen dataclass becomes a parser, and its docstring the help text."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
NULL, BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"  # what YAML takes an unquoted value for


def parse_dataclass(
    cls: Callable[..., T],
    arguments: Sequence[str] | None = None,
    *,
    description: str,
    positional: Sequence[str] = (),
    repeatable: Sequence[str] = (),
    config_help: str | None = None,
) -> T:
    """An instance of `cls` from `--field value` arguments. A mistake prints one line and exits with code 2.

    A boolean flag needs no value: `--compile` is `--compile true`. A list or tuple field takes items separated by
    commas and may be repeated: `--eta 0,1` is `--eta 0 --eta 1`. For any other field the last value wins.

    Args:
        cls: a dataclass with an `Args:` section in its docstring. Its `__post_init__` may raise ValueError.
        arguments: the command line without the program's name; None: that of this process.
        description: what the program does, for --help.
        positional: names of string fields that have no flag, in the order of their values.
        repeatable: list fields whose flag takes one item, commas included, and may be repeated to give several.
        config_help: help text of a `--config FILE` option that reads fields from YAML; None: no such option.
    """
    from docstring_parser import parse
    from jsonargparse import ArgumentError, ArgumentParser

    hints = get_type_hints(cls)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = _complete_switches(arguments, hints, bool(positional))
    arguments = _join_lists(arguments, hints, repeatable)
    parser = ArgumentParser(
        prog=Path(sys.argv[0]).name, description=description, allow_abbrev=False, exit_on_error=False
    )
    if config_help:
        parser.add_argument("--config", action="config", help=config_help)
    field_help = {param.arg_name: param.description for param in parse(cls.__doc__ or "").params}
    for name in positional:
        parser.add_argument(name, type=str, help=field_help[name])
    parser.add_class_arguments(cls, skip=set(positional))
    try:
        values = parser.parse_args(_read_configs(arguments, hints) if config_help else arguments)
        for name, hint in hints.items():  # an empty field of a YAML file is null, which jsonargparse lets pass
            if values[name] is None and types.NoneType not in (hint, *get_args(hint)):
                raise ValueError(f"{name} is null: give {_describe(hint)}")
        return cls(**{name: values[name] for name in hints})
    except (ArgumentError, ValueError) as error:
        print(f"{parser.prog}: {_one_line(str(error), hints)}", file=sys.stderr)
        raise SystemExit(2) from None


def _read_configs(arguments: list[str], hints: dict[str, Any]) -> list[str]:
    """`--config FILE` becomes `--config=<its settings as YAML>`, which jsonargparse takes as well."""
    read: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            return [*read, argument, *remaining]
        if argument == "--config" and remaining:
            argument = f"--config={remaining.pop(0)}"
        if argument.startswith("--config="):
            argument = f"--config={_read_config(Path(argument.removeprefix('--config=')).expanduser(), hints)}"
        read.append(argument)
    return read


def _read_config(path: Path, hints: dict[str, Any]) -> str:
    """The settings in a YAML file, each with its type: text stays as it is written, also if it is `2024` or `no`.

    Raises:
        ValueError: it cannot be read, or holds anything but settings, each once; the message names the file.
    """
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"config is '{path}': {error.strerror or error}; give a YAML file") from None
    except UnicodeDecodeError:
        raise ValueError(f"config is '{path}': its text is not UTF-8; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: Problems parsing config: {error}") from None
    is_settings = isinstance(root, yaml.MappingNode) and all(isinstance(key, yaml.ScalarNode) for key, _ in root.value)
    if not is_settings or not root.value:
        what = "is empty" if root is None or not root.value else "does not hold settings"
        raise ValueError(f"config is '{path}': the file {what}; give it lines such as `learning_rate: 1.0e-4`")
    names = [key.value for key, _ in root.value]
    for i, name in enumerate(names):
        if name not in hints:
            raise ValueError(f"{path}: Option '{name}' is not a setting; --help lists them")
        if name in names[:i]:
            raise ValueError(f"{path}: {name} is given twice: give it once")
    for key, value in root.value:
        hint = hints[key.value]
        for node in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(node, yaml.ScalarNode) and _keeps_text(hint) and node.tag != NULL:
                if node.tag == BOOL and "no" in get_args(hint) and not yaml.safe_load(node.value):
                    node.value = "no"
                node.tag, node.style = "tag:yaml.org,2002:str", '"'
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper))


def _keeps_text(hint: Any) -> bool:
    """Whether a field, or each item of a list, is text and never a number, true or false."""
    hint = _item_type(hint) or hint
    if get_origin(hint) is Literal:
        return all(isinstance(choice, str) for choice in get_args(hint))
    types_of = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return all(kind in (str, types.NoneType) or get_origin(kind) is Literal for kind in types_of)


def _complete_switches(arguments: list[str], hints: dict[str, Any], has_positional: bool) -> list[str]:
    """`--compile` alone becomes `--compile=true`.

    With positional arguments, the argument after the flag is its value only if it is true or false.
    """
    completed = []
    for argument, following in zip(arguments, [*arguments[1:], "-"]):
        has_value = not following.startswith("-") and (not has_positional or following.lower() in ("true", "false"))
        is_switch = argument.startswith("--") and hints.get(argument[2:]) is bool
        completed.append(f"{argument}=true" if is_switch and not has_value else argument)
    return completed


def _join_lists(arguments: list[str], hints: dict[str, Any], repeatable: Sequence[str]) -> list[str]:
    """`--eta 0,1` becomes `--eta=[0,1]`; a value in brackets is YAML already and is left alone."""
    items: dict[str, list[str]] = {}  # of repeatable flags
    joined: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            return [*joined, argument, *remaining]
        flag, equals, value = argument.partition("=")
        item_type = _item_type(hints.get(flag[2:])) if flag.startswith("--") else None
        value_is_missing = not equals and (not remaining or remaining[0].startswith("--"))
        if item_type is None or value_is_missing:  # the parser says what is missing
            joined.append(argument)
            continue
        value = value if equals else remaining.pop(0)
        if value.startswith("[") or value == "null":
            joined.append(f"{flag}={value}")
            continue
        if flag[2:] in repeatable:
            texts = items.setdefault(flag, [])
            texts.append(value)
        else:
            texts = [text.strip() for text in value.split(",")]
        joined.append(f"{flag}=[{','.join(texts if item_type in (int, float) else map(json.dumps, texts))}]")
    return joined


def _item_type(hint: Any) -> Any:
    """The type of the items of a list or tuple field, also of an optional one; None for other fields."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(filter(None, map(_item_type, get_args(hint))), None)
    return get_args(hint)[0] if get_origin(hint) in (list, tuple) else None


def _one_line(message: str, hints: dict[str, Any]) -> str:
    """The message on one line. Ours replaces the up to seven lines of jsonargparse about a value of the wrong type."""
    message = " ".join(message.split()).replace('in "<unicode string>", ', "")
    match = re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: ?(.*)', message)
    if match is None or match[1] not in hints:
        return re.sub(r'^Parser key "(\w+)"', r"\1", message)
    return f"{match[1]} is {match[2]!r}: give {_describe(hints[match[1]])}"


def _describe(hint: Any) -> str:
    """What a field of this type takes, for an error message."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if item_type := _item_type(hint):
        described = _describe(item_type).removeprefix("one of ")
        return f"{described}, or several of them separated by commas"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    return names.get(hint, str(hint))


def exit_code(script: str, work: Callable[[], None], writes_to: str, kept: str) -> int:
    """The exit code of a command: 0; 2 for a mistake or a file that cannot be read or written; 130 for Ctrl-C.

    Args:
        script: its name, which begins every message.
        writes_to: what could not be written if an error does not say which file, as on a full disk.
        kept: what an interruption leaves for the next time.
    """
    try:
        work()
    except OSError as error:
        where = "" if error.filename else f"{writes_to} cannot be written: "
        print(f"{script}: {where}{error}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted. {kept} are kept: run the same command again to continue.", file=sys.stderr)
        return 130
    return 0
