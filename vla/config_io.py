"""Strict loading of the configuration dataclasses: default < YAML < flag, and the same checks for all three."""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import json
import textwrap
import types
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from vla.files import write_whole
from vla.types import UserError


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the file or flag, the field and the value."""

    def __init__(self, message: str) -> None:
        super().__init__(f"config error: {message}")


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """Have what refuses a part of a configuration name its fields and flags by where the part is, `path`, as in "align."."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("config error: ", f"config error: {path}", 1)
        raise UserError(text.replace(" --", f" --{path}")) from error


class HelpRequested(Exception):
    """--help was among the flags; the message is the help text."""


def load_config[C](cls: type[C], argv: list[str]) -> C:
    """Build a configuration from `--config_path FILE` and `--field.subfield=value` flags, of which the last of a field counts.

    Raises:
        ConfigError: unreadable file, unknown key, key that a file repeats, wrong type or value.
        HelpRequested: --help or -h.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        raise HelpRequested(help_text(cls))
    flags = parse_flags(argv)
    config = cls()
    paths = [value for key, value in flags if key == "config_path"]
    for path in paths:
        source = find_config(path)
        merge_mapping(config, read_yaml(source), where=path, path="")
    for key, value in flags:
        if key != "config_path":
            set_field(config, key, value, where=None, from_text=True)
    check(config)
    return config


def parse_flags(argv: list[str]) -> list[tuple[str, str]]:
    """`--a.b=value` and `--a.b value` -> [(key, value)], in order."""
    flags: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}; flags look like --field=value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key}=VALUE, or --{key}=true of a switch")
            value = rest.pop(0)
        flags.append((key.replace("-", "_"), value))
    return flags


def split_flags(argv: list[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """`--sweep.FIELD=a,b,c` flags as {FIELD: (a, b, c)}, and the other flags.

    Raises:
        ConfigError: a sweep without a value, or of a field twice.
    """
    swept: dict[str, tuple[str, ...]] = {}
    rest = []
    for argument in argv:
        if not argument.startswith("--sweep."):
            rest.append(argument)
            continue
        name, _, values = argument.removeprefix("--sweep.").partition("=")
        texts = tuple(_listed(values))
        if not texts or name in swept or len(set(texts)) < len(texts):
            raise ConfigError(f"{argument}: a sweep is --sweep.FIELD=a,b,c with different values, each field once")
        swept[name] = texts
    return swept, rest


def find_config(path: str) -> Path:
    """The file as given, or the one shipped with the package (`configs/align/tabletop.yaml`)."""
    if Path(path).is_file():
        return Path(path)
    shipped = Path(str(resources.files("vla"))) / path
    if shipped.is_file():
        return shipped
    raise ConfigError(f"{path}: {'a folder; name a file in it' if Path(path).is_dir() else 'no such file'}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file; repeated keys are refused."""
    try:
        text = path.read_text()
        refuse_repeats(yaml.compose(text, Loader=yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path.name}:{line} {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path.name}: must hold fields, got {type(loaded).__name__}")
    return loaded


def refuse_repeats(node: yaml.Node | None) -> None:
    """Raise yaml.MarkedYAMLError if a mapping in a YAML tree has a key twice, where PyYAML lets the last one win."""
    stack, visited = [node], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in visited:  # an alias may lead back to where it is
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
            continue
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            stack.append(value)


def merge_mapping(config: Any, mapping: dict[str, Any], where: str, path: str) -> None:
    """Set every key of a mapping, and of the mappings inside it."""
    for key, value in mapping.items():
        name = f"{path}{key}"
        current = getattr(config, str(key), None)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            merge_mapping(current, value, where, f"{name}.")
        else:
            set_field(config, str(key), value, where, from_text=False, shown=name)


def set_field(
    config: Any, key: str, value: Any, where: str | None, *, from_text: bool, shown: str | None = None
) -> None:
    """Set a (dotted) field after checking its name and type."""
    shown = shown or key
    prefix = f"{where}: " if where else ""
    *parents, name = key.split(".")
    for parent in parents:
        known = {f.name for f in dataclasses.fields(config)}
        if parent not in known or not dataclasses.is_dataclass(getattr(config, parent)):
            raise ConfigError(f"{prefix}{_unknown(parent, config, shown)}")
        config = getattr(config, parent)
    hints = get_type_hints(type(config))
    if name not in hints:
        raise ConfigError(f"{prefix}{_unknown(name, config, shown)}")
    if dataclasses.is_dataclass(hints[name]):
        raise ConfigError(f"{prefix}{shown} holds fields; set one of them, for example --{shown}.NAME=value")
    try:
        converted = _from_text(value, hints[name]) if from_text else value
        setattr(config, name, _checked(converted, hints[name]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}{shown} must be {error}, got {value!r}") from error


def _unknown(name: str, config: Any, shown: str) -> str:
    known = [f.name for f in dataclasses.fields(config)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
    return f"{shown} is not a field of {type(config).__name__}{hint}"


def _from_text(text: str, hint: Any) -> Any:
    """A flag's text as a value of the hinted type, where its form allows only one reading."""
    if text.lower() in ("none", "null") and _optional(hint):
        return None
    base = _optional(hint) or hint
    if get_origin(base) is tuple:
        return tuple(_from_text(part, get_args(base)[0]) for part in _listed(text))
    if base is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if base in (int, float):
        for read in (int, float):
            try:
                return read(text)
            except ValueError:
                continue
    return text


def _listed(text: str) -> list[str]:
    """What a list names, with or without brackets around it: `[a, b]`, `(a, b)` or `a,b`."""
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    return [part.strip() for part in text.split(",") if part.strip()]


def _checked(value: Any, hint: Any) -> Any:
    """The value, if it is of the hinted type; ints pass as floats, nothing else is converted."""
    inner = _optional(hint)
    if inner is not None:
        return None if value is None else _checked(value, inner)
    origin = get_origin(hint)
    if origin is Literal:
        if value is False and "no" in get_args(hint):  # YAML reads no as false
            return "no"
        if value not in get_args(hint) or isinstance(value, bool):
            raise ValueError("one of " + ", ".join(map(str, get_args(hint))))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_checked(item, get_args(hint)[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 3e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    names = {int: "an int", float: "a number", str: "a string", bool: "true or false"}
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(names[hint])
    if hint is float and not abs(value) < float("inf"):
        raise ValueError("finite")
    return value


def _optional(hint: Any) -> Any:
    """T of `T | None`, else None."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [a for a in get_args(hint) if a is not type(None)]
        return inner[0] if len(inner) == 1 else None
    return None


def check(config: Any, path: str = "") -> None:
    """Ranges and multiples, from each field's metadata: `range` is (lowest, highest), inclusive, a highest of None for open."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{path}{field.name}.")
        elif "range" in field.metadata and value is not None:
            low, high = field.metadata["range"]
            if value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{path}{field.name} must be {bounds}, got {value!r}")
            if (multiple := field.metadata["multiple"]) > 1 and value % multiple:
                raise ConfigError(f"{path}{field.name} must be a multiple of {multiple}, got {value!r}")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values for YAML and JSON; tuples become lists."""
    return {
        f.name: to_dict(v) if dataclasses.is_dataclass(v) else list(v) if isinstance(v, tuple) else v
        for f in dataclasses.fields(config)
        for v in [getattr(config, f.name)]
    }


def save_yaml(config: Any, path: Path) -> None:
    """The resolved configuration; `--config_path` reads it back to an equal one."""
    write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def help_text(cls: type) -> str:
    """Every field with its comment and default."""
    lines = [inspect.cleandoc(cls.__doc__ or cls.__name__), "", "  --config_path FILE", "      YAML with any of these"]
    lines += ["  --json", "      print the result as JSON, and what people read to standard error"]
    for name, comment, default in _fields(cls(), ""):
        lines += [f"  --{name}={default}", f"      {comment}"]
    return "\n".join(lines)


def _fields(config: Any, path: str) -> list[tuple[str, str, Any]]:
    comments = field_comments(type(config))
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _fields(value, f"{path}{field.name}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            found.append((path + field.name, comments.get(field.name, ""), shown))
    return found


def field_comments(cls: type) -> dict[str, str]:
    """The comment behind each field in the source of a dataclass, or behind its default within parentheses."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    comments = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            for part in (node, node.value):
                _, hash_sign, comment = lines[part.end_lineno - 1][part.end_col_offset :].partition("#")
                if hash_sign:
                    comments[node.target.id] = comment.strip()
                    break
    return comments


def filled(tree: dict, usual: dict) -> dict:
    """The mapping with the usual values where it has none, at any depth."""
    return {
        key: filled(tree[key], value)
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
        else tree.get(key, value)
        for key, value in usual.items()
    }


def changed(before: dict, now: dict) -> dict[str, str]:
    """`align.steps=800, not 900` of all that differs between two configurations, plain mappings, by dotted name."""
    before, now = flat(before), flat(now)
    return {
        name: f"{name}={json.dumps(before.get(name))}, not {json.dumps(now.get(name))}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    }


def flat(tree: dict, path: str = "") -> dict:
    """A nested mapping by dotted names."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found
