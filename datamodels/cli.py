"""Command lines of the shape `--section.name=value`, with `-C FILE`, the environment and `--help`.

This is the only file of the package that touches fastargs (1.2.0), and the one place where its surprises are
put right. Left to itself fastargs exits 0 on a validation error, lets the environment beat the command line,
lets an absent flag beat the file, reads `--flag False` as true, truncates 2.7 to 2, takes YAML's `5e-3` for
text, and registers every section of every program in one global object. Here each call of `parse` fills a
config of its own, and fastargs' global one is left to the user's module (`collect_user`).

    args = parse("python -m datamodels.worker", "Train rows of a store.",
                 {"worker": {"index": Option(int, "row to run", min=0)}}, passthrough=True)
    args["worker.index"], args.given("worker.index"), args.rest
"""

import difflib
import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import fastargs
from fastargs import validation
from fastargs.exceptions import MissingValueError, ValidationError

from datamodels.errors import ConfigError, DatamodelsError, json_mistake

ENV_PREFIX = "DATAMODELS_"
_EXPECTED = {
    int: "an int",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "names, a,b or a list",
    dict: "numbers by name, a=0,b=1 or a mapping",
}
_METAVAR = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", list: "A,B", dict: "A=0,B=1"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NEGATIVE_NUMBER = re.compile(r"-(\d|\.\d|inf)")


@dataclass(frozen=True)
class Option:
    """One `--section.name`: its kind (int, float, bool, str, list of names, dict of numbers), help, default and limits.

    `ignored` says why a key of the released code is accepted and does nothing; its value is then never read.
    """

    kind: type
    help: str
    default: Any = None
    required: bool = False
    choices: Sequence[Any] | None = None
    min: float | None = None
    max: float | None = None
    ignored: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _EXPECTED:
            raise ValueError(f"an option is int, float, bool, str, list or dict, not {self.kind!r}")
        if self.required and self.default is not None:
            raise ValueError(f"a required option has no default, got {self.default!r}")
        if self.default is not None:
            object.__setattr__(self, "default", self.check(self.default))

    @property
    def expected(self) -> str:
        """What the option takes, in words: 'an int >= 0'."""
        if self.choices is not None:
            return "one of " + ", ".join(map(_show, self.choices))
        low = f" >= {_show(self.min)}" if self.min is not None else ""
        high = f" <= {_show(self.max)}" if self.max is not None else ""
        return _EXPECTED[self.kind] + low + (" and" if low and high else "") + high

    def check(self, value: Any) -> Any:
        """`value` as the option's kind; raises ValueError, without a message, for what it does not take."""
        value = convert(self.kind, value)
        if self.choices is not None and value not in self.choices:
            raise ValueError
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise ValueError
        return value


def convert(kind: type, value: Any) -> Any:
    """`value` (text, or what YAML and JSON make of it) as that kind; ValueError before anything is lost."""
    if kind is str:
        if not isinstance(value, str):
            raise ValueError
        return value
    if kind is bool:
        word = str(value).strip().lower() if isinstance(value, (str, int)) else ""
        if word not in _TRUE + _FALSE:
            raise ValueError
        return word in _TRUE
    if kind is list:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError
        return names
    if kind is dict:
        if isinstance(value, str):
            pairs = [[part.strip() for part in item.split("=")] for item in value.split(",")]
        elif isinstance(value, dict):
            pairs = [list(pair) for pair in value.items()]
        else:
            raise ValueError
        if not all(len(pair) == 2 and isinstance(pair[0], str) and pair[0] for pair in pairs):
            raise ValueError
        numbers = {name: convert(float, number) for name, number in pairs}
        if len(numbers) < len(pairs):
            raise ValueError
        return numbers
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    if kind is float:
        number = float(value)
        if math.isnan(number):
            raise ValueError
        return number
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)  # 1e3 is an int in people's minds
    # Above 2**53 a float has already lost the int that was meant.
    if isinstance(value, float) and not (value.is_integer() and abs(value) <= 2**53):
        raise ValueError
    return int(value)


class _Given(NamedTuple):
    """A value as it came, and from where."""

    value: Any
    where: str


class _Kind(validation.Checker):  # type: ignore[misc]
    """An Option as fastargs sees it."""

    def __init__(self, option: Option):
        self.option = option

    def check(self, value: Any) -> Any:
        return self.option.check(value)

    def help(self) -> str:
        return self.option.expected


def _strict(checker: Any, value: Any) -> Any:
    """What fastargs' own checkers say of `value`, with int, float, bool and str meaning what they say."""
    kinds = {validation.Int: int, validation.Float: float, validation.Bool: bool, validation.Str: str}
    if type(checker) in kinds:
        return convert(kinds[type(checker)], value)
    if type(checker) is validation.And:
        for part in checker.checkers:
            value = _strict(part, value)
        return value
    if type(checker) is validation.Or:
        for part in checker.checkers:
            try:
                return _strict(part, value)
            except Exception:  # a checker may raise whatever it likes
                continue
        raise ValueError
    return checker.check(value)


class _Config(fastargs.Config):  # type: ignore[misc]
    """fastargs' config, put right: exact kinds, command line > file > environment, exit code 2.

    The user's global config becomes one of these too, so that a main() that calls `augment_argparse`,
    `collect_argparse_args` and `validate` itself gets the same answers again.
    """

    def __getitem__(self, path: str | tuple[str, ...]) -> Any:
        path = tuple(path.split(".")) if isinstance(path, str) else path
        if path not in self.entries:
            # Released scripts may ask for our own keys: everything was in one registry then.
            outer: Any = getattr(self, "_outer", None)
            if outer is not None and path in outer.entries:
                return outer[path]
            raise KeyError(f"{'.'.join(path)} not defined")
        param = self.entries[path]
        if not param.section.is_enabled(self):
            return None
        value = self.content.get(path)
        if value is None:
            if param.default is None and not param.required:
                return None
            return param.validate(param.default)  # the author's own default: as fastargs reads it
        try:
            return _strict(param.checker, value)
        except Exception as error:  # a checker may raise whatever it likes
            raise ValidationError(str(error)) from None

    def fill(self, argv: Sequence[str], files: Sequence["_File"]) -> tuple[dict[str, _Given], "_Tokens"]:
        """Sets what environment, files and `argv` say of the keys known here; returns it and what is left."""
        while True:
            known = {".".join(path): path for path in self.entries}
            tokens = _tokenize(argv, known, [key for key in known if _is_switch(self.entries[known[key]])])
            given = {**_from_environment(known), **_from_files(files, known), **tokens.given}
            for key, item in given.items():
                self.content[known[key]] = item.value
                try:
                    # A Module checker imports here, and the module may register more sections.
                    self[known[key]]
                except Exception:
                    continue  # judged, with a proper message, by whoever called
            if len(self.entries) == len(known):
                return given, tokens

    def collect_argparse_args(self, parser: Any, disable_help: bool = False) -> "_Config":
        """Reads sys.argv and the environment anew, for a main() that asks; leaves unknown arguments alone."""
        if "--help" in sys.argv[1:] and not disable_help:
            parser.print_help()
            raise SystemExit(0)
        files = [_read_file(name) for name in _tokenize(sys.argv[1:], (), ()).files]
        self.fill(sys.argv[1:], files)
        return self

    def validate(self, mode: str = "stderr") -> dict[tuple[str, ...], Exception] | None:
        """As fastargs', except that it ends with exit code 2 and one plain line."""
        errors: dict[tuple[str, ...], Exception] = {}
        for path in list(self.entries):
            try:
                self[path]
            except (MissingValueError, ValidationError) as error:
                errors[path] = error
        if mode == "errordict":
            return errors
        if errors:
            complaints = [self._complain(path, error) for path, error in errors.items()]
            print("error: " + "; ".join(complaints), file=sys.stderr)
            raise SystemExit(2)
        return None

    def summary(self, target: Any = None) -> "_Config":
        """As fastargs', as plain lines: its table is terminal escapes, and its stderr the one of import time."""
        print("\n".join(self.lines()), file=sys.stderr if target is None else target)
        return self

    def lines(self) -> list[str]:
        """Every value that can be had, one `section.name  value` a line."""
        bad = self.validate(mode="errordict") or {}
        values = {".".join(path): self[path] for path in self.entries if path not in bad}
        width = max(map(len, values), default=0)
        return [f"{name:{width}}  {value!r}" for name, value in values.items()]

    def _complain(self, path: tuple[str, ...], error: Exception) -> str:
        name = ".".join(path)
        if isinstance(error, MissingValueError):
            return f"--{name} is required"
        return f"{name}: expected {self.entries[path].checker.help()}, got {self.content.get(path)!r}"


def _is_switch(param: Any) -> bool:
    """Whether a bare `--key` means true."""
    kind = param.checker.option.kind if isinstance(param.checker, _Kind) else None
    return kind is bool or bool(param.is_flag) or type(param.checker) is validation.Bool


# -- the three places a value comes from ----------------------------------------------------------------


def environment_name(key: str) -> str:
    """`worker.job_timeout` is DATAMODELS_WORKER_JOB_TIMEOUT in the environment."""
    return ENV_PREFIX + key.upper().replace(".", "_").replace("-", "_")


def _from_environment(known: Iterable[str]) -> dict[str, _Given]:
    found = {}
    for key in known:
        for name in (key, environment_name(key)):  # the dotted name is the released code's
            if name in os.environ:
                found[key] = _Given(os.environ[name], f"environment variable {name}")
                break
    return found


@dataclass(frozen=True)
class _File:
    """A -C file: nested mappings of text keys, and the line of each value where the format tells it."""

    name: str
    tree: dict[str, Any]
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    def leaves(self, known: Collection[str]) -> Iterator[tuple[str, _Given]]:
        """(dotted key, value) pairs; a mapping under a known key is that key's value."""

        def walk(tree: dict[str, Any], path: tuple[str, ...], keys: tuple[str, ...]) -> Iterator[tuple[str, _Given]]:
            for key, value in tree.items():
                name = ".".join((*path, key))
                if isinstance(value, dict) and name not in known:
                    yield from walk(value, (*path, key), (*keys, key))
                elif value is not None:  # nothing after the colon: not given
                    line = self.lines.get((*keys, key))
                    yield name, _Given(value, self.name + (f", line {line}" if line else ""))

        return walk(self.tree, (), ())


def _from_files(files: Sequence[_File], known: Collection[str]) -> dict[str, _Given]:
    return {key: item for file in files for key, item in file.leaves(known) if key in known}


def _read_file(name: str) -> _File:
    """The -C file, as YAML or JSON; raises ConfigError naming the file, and line and column where it can."""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"-C {name}: cannot be read ({reason}); expected a YAML or JSON file") from None
    if text.lstrip().startswith("{"):
        try:
            file = _File(name, json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, name)))
        except json.JSONDecodeError as error:
            if name.endswith(".json"):
                raise ConfigError(
                    f"-C {name}, line {error.lineno}, column {error.colno}: {json_mistake(error)}"
                ) from None
            file = _read_yaml(name, text)  # YAML's {a: 1} begins like JSON
    elif name.endswith(".json"):
        raise ConfigError(f'-C {name}, line 1, column 1: expected {{"section": {{"name": value}}}}, in JSON')
    else:
        file = _read_yaml(name, text)
    for key, value in file.tree.items():
        if "." not in key and value is not None and not isinstance(value, dict):
            raise ConfigError(
                f"-C {name}: {key!r} should be a section, that is a mapping of names to values, got {value!r}"
            )
    return file


def _no_duplicates(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ConfigError(f"-C {name}: {twice!r} is given twice in the same place; keep one")
    return seen


def _read_yaml(name: str, text: str) -> _File:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML 1.2's scalars: `5e-3` and `90_000` are numbers, `no` and `1:30` are text, `010` is ten."""

        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def number(loader: Any, node: Any) -> int | float:
        plain = node.value.replace("_", "")
        return float(plain.replace(".inf", "inf").replace(".INF", "inf").replace(".Inf", "inf"))

    tag = "tag:yaml.org,2002:"
    Loader.add_implicit_resolver(tag + "null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_implicit_resolver(tag + "bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
    Loader.add_implicit_resolver(tag + "merge", re.compile(r"^<<$"), ["<"])
    digits = [*"-+0123456789."]
    Loader.add_implicit_resolver(tag + "int", re.compile(r"^[-+]?\d+(_\d+)*$"), digits)
    Loader.add_implicit_resolver(
        tag + "float",
        re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$"),
        digits,
    )
    Loader.add_constructor(tag + "int", lambda loader, node: int(node.value))
    Loader.add_constructor(tag + "float", number)

    lines: dict[tuple[str, ...], int] = {}
    loader = Loader(text)

    def build(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, yaml.MappingNode):
            lines[path] = node.start_mark.line + 1
            return loader.construct_object(node, deep=True)
        seen: set[str] = set()
        for key_node, _ in node.value:
            mark = key_node.start_mark
            place = f"-C {name}, line {mark.line + 1}, column {mark.column + 1}"
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (tag + "str", tag + "merge"):
                raise ConfigError(f"{place}: expected a name before the colon, got {key_node.value!r}")
            if key_node.value in seen:
                raise ConfigError(f"{place}: {key_node.value!r} is given twice in the same place; keep one")
            seen.add(key_node.value)
        loader.flatten_mapping(node)
        return {key.value: build(value, (*path, key.value)) for key, value in node.value}

    try:
        root = loader.get_single_node()
        tree = {} if root is None else build(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"-C {name}{place}: not YAML ({error.problem or error.context})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"-C {name}: not YAML ({error})") from None
    except RecursionError:
        raise ConfigError(f"-C {name}: a mapping refers to itself") from None
    finally:
        loader.dispose()
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"-C {name}, line 1: expected a mapping of sections, got {str(tree)[:60]!r}")
    return _File(name, tree, lines)


@dataclass
class _Tokens:
    """A command line taken apart: what belongs to known keys, the -C files, and what is left, in order."""

    given: dict[str, _Given] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    help: bool = False
    # (the argv items, the unknown key or "", the file's name or "")
    left: list[tuple[tuple[str, ...], str, str]] = field(default_factory=list)


def _tokenize(argv: Sequence[str], known: Collection[str], switches: Collection[str]) -> _Tokens:
    tokens = _Tokens()
    items = list(argv)
    at = 0

    def value_follows() -> bool:
        return at < len(items) and (not items[at].startswith("-") or bool(_NEGATIVE_NUMBER.match(items[at])))

    while at < len(items):
        item = items[at]
        at += 1
        name, equals, value = item.partition("=")
        if item == "--":
            tokens.left.append((tuple(items[at - 1 :]), "", ""))
            break
        if item in ("-h", "--help"):
            tokens.help = True
        elif name in ("-C", "--config-file") or (item.startswith("-C") and not item.startswith("--")):
            used: tuple[str, ...] = (item,)
            if not equals and name not in ("-C", "--config-file"):
                value = item[2:]
            elif not equals:
                if at >= len(items):
                    raise ConfigError(f"{item} (command line): expected a YAML or JSON file after it")
                value, used = items[at], (item, items[at])
                at += 1
            tokens.files.append(value)
            tokens.left.append((used, "", value))
        elif not item.startswith("--"):
            tokens.left.append(((item,), "", ""))
        elif name[2:] not in known:
            tokens.left.append(((item,), name[2:], ""))
        elif equals:
            tokens.given[name[2:]] = _Given(value, "command line")
        elif name[2:] in switches:
            has_value = at < len(items) and items[at].strip().lower() in _TRUE + _FALSE
            tokens.given[name[2:]] = _Given(items[at] if has_value else "true", "command line")
            at += has_value
        elif value_follows():
            tokens.given[name[2:]] = _Given(items[at], "command line")
            at += 1
        else:
            raise ConfigError(f"{name} (command line): expected a value after it; write {name}=VALUE")
    return tokens


# -- what entry points call -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """What one call was asked to do: values by dotted key, and, with passthrough, what is the user's.

    `rest` is what sys.argv[1:] should be while the user's main runs; `unknown` lists (key, where) that nobody
    has judged yet.
    """

    positional: dict[str, Any]
    rest: list[str]
    unknown: list[tuple[str, str]]
    help_requested: bool
    _config: _Config
    _options: dict[str, Option]
    _given: dict[str, _Given]
    _files: list[_File]
    _elsewhere: frozenset[str]
    _help: Callable[[str], str]

    def __getitem__(self, key: str) -> Any:
        """The value of `--key`, or its default (None when it has none)."""
        option = self._options[key]
        return option.default if option.ignored is not None else self._config[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `--key`; `default` where it has none, or where there is no such key."""
        value = self[key] if key in self._options else None
        return default if value is None else value

    def section(self, name: str) -> dict[str, Any]:
        """All values of one section by their short names."""
        return {key.removeprefix(name + "."): self[key] for key in self._options if key.rpartition(".")[0] == name}

    def given(self, key: str) -> bool:
        """Whether anyone set the key: command line, file or environment."""
        return key in self._given

    def where(self, key: str) -> str:
        """'command line', 'FILE, line 3', 'environment variable NAME' or 'default'."""
        return self._given[key].where if key in self._given else "default"


def parse(
    prog: str,
    description: str,
    sections: Mapping[str, Mapping[str, Option]],
    argv: Sequence[str] | None = None,
    *,
    positional: Sequence[tuple[str, str]] = (),
    passthrough: bool = False,
    help_later: str | None = None,
    elsewhere: Collection[str] = (),
    short: str | None = None,
) -> Arguments:
    """Reads command line > -C files > environment; raises ConfigError (see `run`) for what cannot be used.

    `positional` are (name, help); "name?" may be left out (None), a last "name..." takes any number (a list).
    With `passthrough`, what is not known is kept in `rest` and `unknown` for `collect_user`.
    `--help` prints and exits. With `help_later="worker.main_import"` and that key given, it is `collect_user`
    that prints, once the user's module has registered its sections; until then nothing is judged, so while
    `help_requested` do nothing but import the module.
    `elsewhere` names sections that another program reads from the same -C file. `short` is a section whose options
    may be written without its name, `--watch` for `--store.watch`; help shows them so.
    """
    if positional and passthrough:
        raise ValueError("with passthrough nobody can tell whose the positional arguments are")
    argv = sys.argv[1:] if argv is None else list(argv)
    if short is not None:
        argv = _lengthen(argv, short)
    options = {f"{section}.{name}": names[name] for section, names in sections.items() for name in names}
    config = _Config()
    for section, names in sections.items():
        params = {
            name: fastargs.Param(_Kind(option), option.help, default=option.default, required=option.required)
            for name, option in names.items()
        }
        fastargs.Section(section, config_descriptor=config).params(**params)

    tokens = _tokenize(argv, options, [key for key, option in options.items() if option.kind is bool])

    def help_text(more: str) -> str:
        return _help(prog, description, sections, positional, passthrough, help_later, more, short)

    if tokens.help and help_later is None:
        _print_help(help_text(""))
    files = [_read_file(name) for name in tokens.files]
    given, tokens = config.fill(argv, files)
    if tokens.help and help_later not in given:
        _print_help(help_text(""))

    rest: list[str] = []
    unknown: list[tuple[str, str]] = []
    loose: list[str] = []
    stray: str | None = None
    by_name = {file.name: file for file in files}
    for used, key, file_name in tokens.left:
        if file_name:
            foreign = [
                (leaf, item.where)
                for leaf, item in by_name[file_name].leaves(options)
                if leaf not in options and leaf.partition(".")[0] not in elsewhere
            ]
            unknown += foreign
            rest += used if foreign else ()
        else:
            rest += used
            if key:
                unknown.append((key, "command line"))
            elif used[0] == "--":
                loose += used[1:]
            else:
                loose += used
                stray = stray or (used[0] if re.match("-.", used[0]) else None)

    if not passthrough:
        if unknown:
            raise ConfigError(unknown_message(*unknown[0], list(options)))
        if stray:
            raise ConfigError(f"{stray} (command line): options begin with two dashes; see {prog} --help")
    if not tokens.help:
        _judge(options, given, unknown, config)
    return Arguments(
        positional={} if passthrough or tokens.help else _place(prog, positional, loose),
        rest=rest if passthrough else [],
        unknown=unknown,
        help_requested=tokens.help,
        _config=config,
        _options=options,
        _given=given,
        _files=files,
        _elsewhere=frozenset(elsewhere),
        _help=help_text,
    )


def _lengthen(argv: Sequence[str], section: str) -> list[str]:
    """`--name` as `--section.name`, up to a lone `--`."""
    items = list(argv)
    for at, item in enumerate(items):
        if item == "--":
            break
        name = item.partition("=")[0]
        if name.startswith("--") and "." not in name and name not in ("--help", "--config-file"):
            items[at] = f"--{section}.{item[2:]}"
    return items


def _judge(
    options: Mapping[str, Option],
    given: Mapping[str, _Given],
    unknown: Sequence[tuple[str, str]],
    config: _Config,
) -> None:
    for key, item in given.items():
        option = options[key]
        if option.ignored is not None:
            print(f"note: {key} ({item.where}) does nothing: {option.ignored}", file=sys.stderr)
            continue
        try:
            config[key]
        except ValidationError:
            raise ConfigError(_bad_value(key, item, option.expected, option.kind, option.choices)) from None
    missing = [key for key, option in options.items() if option.required and key not in given]
    for key, where in unknown:
        if _nearest(key, missing) is not None:  # mistyped, so "is required" would send people the wrong way
            raise ConfigError(unknown_message(key, where, missing))
    if missing:
        raise ConfigError(_missing(missing))


def _bad_value(
    key: str, item: _Given, expected: str, kind: type | None = None, choices: Sequence[Any] | None = None
) -> str:
    hint = ""
    if kind is str and not choices and isinstance(item.value, (bool, int, float)):
        hint = "; put it in quotes"
    if choices and isinstance(item.value, str):
        near = difflib.get_close_matches(item.value, [str(choice) for choice in choices], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
    dashes = "--" if item.where == "command line" else ""
    return f"{dashes}{key} ({item.where}): expected {expected}, got {item.value!r}{hint}"


def _missing(keys: Sequence[str]) -> str:
    names = ", ".join(f"--{key}" for key in keys)
    verb, it = ("is", "it") if len(keys) == 1 else ("are", "them")
    return (
        f"{names} {verb} required; give {it} on the command line, in a -C file, or in the environment "
        f"({environment_name(keys[0])})"
    )


def _place(prog: str, positional: Sequence[tuple[str, str]], values: list[str]) -> dict[str, Any]:
    placed: dict[str, Any] = {}
    left = list(values)
    for name, _ in positional:
        if name.endswith("..."):
            placed[name.removesuffix("...")] = left
            left = []
        elif left:
            placed[name.removesuffix("?")] = left.pop(0)
        elif name.endswith("?"):
            placed[name.removesuffix("?")] = None
        else:
            raise ConfigError(f"{name} (command line) is missing; usage: {_usage(prog, positional, False)}")
    if left:
        raise ConfigError(f"{left[0]!r} (command line): one argument too many; see {prog} --help")
    return placed


def _nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key that was probably meant: same letters, same last part, or few edits away."""

    def plain(name: str) -> str:
        return re.sub(r"[-_.]", "", name).lower()

    for other in known:
        if plain(other) == plain(key):
            return other
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if near:
        return near[0]
    return next((other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]), None)


def unknown_message(key: str, where: str, known: Sequence[str]) -> str:
    """That there is no such key, and which of `known` was probably meant."""
    dashes = "--" if where == "command line" else ""
    near = _nearest(key, known)
    advice = f"did you mean {dashes}{near}?" if near else "see --help for the keys there are"
    return f"{dashes}{key} ({where}): unknown key; {advice}"


def collect_user(args: Arguments) -> None:
    """Fills fastargs' global registry, the sections of the user's module, once that has been imported.

    Same order as everywhere: environment < file < command line. Raises ConfigError for a key that neither
    side knows, a required key without a value, or a value of the wrong kind. An argument that is in no
    section, such as `--epochs 3`, is left in `args.rest` with a note, since released mains may parse sys.argv
    themselves; likewise every unknown key when the module has no section at all.
    """
    config = fastargs.get_current_config()
    # The object itself is kept: the user's module may hold on to it.
    config.__class__ = _Config
    config._outer = args._config
    for key, item in args._given.items():
        if tuple(key.split(".")) in config.entries:  # a section of ours that the module declares as well
            config.content[tuple(key.split("."))] = item.value
    given, tokens = config.fill(args.rest, args._files)
    if args.help_requested:
        _print_help(args._help(_user_help(config)))

    known = [".".join(path) for path in config.entries]
    leftover = [(key, "command line") for _, key, _ in tokens.left if key]
    for file in args._files:
        leftover += [
            (leaf, item.where)
            for leaf, item in file.leaves({*known, *args._options})
            if not (leaf in known or leaf in args._options or leaf.partition(".")[0] in args._elsewhere)
        ]
    own_sections = {key.rpartition(".")[0] for key in args._options}
    for key, where in leftover:
        near = _nearest(key, [*args._options, *known])
        ours = key.rpartition(".")[0] in own_sections
        alike = near is not None and difflib.SequenceMatcher(None, key, near).ratio() > 0.8
        if ours or alike or (known and "." in key):
            raise ConfigError(unknown_message(key, where, [*args._options, *known]))
        dashes = "--" if where == "command line" else ""
        print(f"note: {dashes}{key} ({where}) is in no section; left for main() to read", file=sys.stderr)

    for key, item in given.items():
        try:
            config[key]
        except ValidationError:
            param = config.entries[tuple(key.split("."))]
            raise ConfigError(_bad_value(key, item, param.checker.help())) from None
    missing = []
    for path, param in list(config.entries.items()):
        try:
            config[path]
        except MissingValueError:
            missing.append(".".join(path))
        except ValidationError:
            expected = f"expected {param.checker.help()}, got its own default {param.default!r}"
            raise ConfigError(f"{'.'.join(path)}: {expected}; mend the Param") from None
    if missing:
        raise ConfigError(_missing(missing))


def collect_global(conf_path: str | os.PathLike[str] | None = None) -> Any:
    """fastargs' global config, filled as `collect_user` does, for a script that is a program of its own.

    `conf_path` is one more file, read before the -C files. Ends with exit code 2, or after `--help` with 0.
    """
    from argparse import ArgumentParser

    config = fastargs.get_current_config()
    config.__class__ = _Config
    try:
        if conf_path is not None:
            config.fill([], [_read_file(os.fspath(conf_path))])
        parser = ArgumentParser()
        config.augment_argparse(parser)
        config.collect_argparse_args(parser)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config.validate(mode="stderr")
    return config


def user_values() -> list[str]:
    """The user's own settings as `collect_user` left them, one `section.name  value` per line."""
    lines: list[str] = fastargs.get_current_config().lines()
    return lines


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main's exit code; what a user can put right is one line on stderr, no traceback.

    ConfigError exits 2, any other DatamodelsError 1, Ctrl-C 130, a reader that went away 141 and silently.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except DatamodelsError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Python flushes stdout once more on its way out and would complain about the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    raise SystemExit(code)


@dataclass(frozen=True)
class Verb:
    """One `python -m program VERB`: a line of help, what it calls with its arguments, its options and its places.

    `run` returns the exit code; `positional` is as in `parse`; `details` is shown by the verb's own --help.
    """

    help: str
    run: Callable[[Arguments], int]
    options: Mapping[str, Option] = field(default_factory=dict)
    positional: Sequence[tuple[str, str]] = ()
    details: str = ""


def run_verb(
    prog: str, description: str, section: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None = None
) -> int:
    """Calls the verb that `argv` begins with and returns its exit code; `--help` in its place lists all of them.

    A verb's options are those of `section`, and may be written without its name. Raises ConfigError as `parse` does.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        text = _verbs_help(prog, description, verbs)
        if argv:
            _print_help(text)
        raise ConfigError(f"verb (command line) is missing; expected one of {', '.join(verbs)}; see {prog} --help")
    name = argv[0]
    if name not in verbs:
        near = difflib.get_close_matches(name, list(verbs), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; see {prog} --help"
        raise ConfigError(f"verb (command line): expected one of {', '.join(verbs)}, got {name!r}{hint}")
    verb = verbs[name]
    text = f"{verb.help[0].upper()}{verb.help[1:]}." + (f"\n\n{verb.details}" if verb.details else "")
    try:
        args = parse(
            f"{prog} {name}", text, {section: verb.options}, argv[1:], positional=verb.positional, short=section
        )
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"--{section}.", "--")) from None
    return verb.run(args)


def _verbs_help(prog: str, description: str, verbs: Mapping[str, Verb]) -> str:
    lines = [f"usage: {prog} VERB ... [--name=value ...]", "", *_wrap(description), "", "verbs"]
    for name, verb in verbs.items():
        places = " ".join(_places(verb.positional))
        lines += _entry(f"{name} {places}", verb.help)
    return "\n".join([*lines, "", f"{prog} VERB --help shows what a verb takes."])


# -- --help ---------------------------------------------------------------------------------------------


def _print_help(text: str) -> NoReturn:
    print(text)
    sys.stdout.flush()
    raise SystemExit(0)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value) or "''"


def _places(positional: Sequence[tuple[str, str]]) -> list[str]:
    places = []
    for name, _ in positional:
        bare = name.removesuffix("...").removesuffix("?").upper()
        optional = f"[{bare} ...]" if name.endswith("...") else f"[{bare}]"
        places.append(optional if name.endswith(("...", "?")) else bare)
    return places


def _usage(prog: str, positional: Sequence[tuple[str, str]], passthrough: bool, short: str | None = None) -> str:
    more = ["[what your main takes ...]"] if passthrough else []
    option = "[--section.name=value ...]" if short is None else "[--name=value ...]"
    return " ".join([prog, *_places(positional), option, "[-C FILE ...]", *more])


def _help(
    prog: str,
    description: str,
    sections: Mapping[str, Mapping[str, Option]],
    positional: Sequence[tuple[str, str]],
    passthrough: bool,
    help_later: str | None,
    user: str,
    short: str | None = None,
) -> str:
    usage = "usage: " + _usage(prog, positional, passthrough, short)
    lines = textwrap.wrap(usage, _width(), subsequent_indent=" " * 7, break_on_hyphens=False)
    lines += ["", *_wrap(description)]
    if positional:
        lines += ["", "arguments"]
        for name, text in positional:
            lines += _entry(name.removesuffix("?").upper(), text)
    for section, names in sections.items():
        prefix = "--" if section == short else f"--{section}."
        if names:
            lines += ["", "options" if section == short else section]
        for name, option in names.items():
            facts = []
            if option.required:
                facts.append("required")
            if option.choices is not None or option.min is not None or option.max is not None:
                facts.append(option.expected)
            if option.default is not None:
                facts.append(f"default {_show(option.default)}")
            if option.ignored is not None:
                facts = [f"accepted, does nothing: {option.ignored}"]
            left = f"{prefix}{name}" + ("[=BOOL]" if option.kind is bool else f"={_METAVAR[option.kind]}")
            lines += _entry(left, f"{option.help} [{'; '.join(facts)}]" if facts else option.help)
    if user:
        lines += ["", user]
    elif help_later is not None:
        lines += ["", *_wrap(f"With --{help_later}=MODULE, --help shows that module's own options too.")]
    first = next(((section, name) for section, names in sections.items() for name in names), None)
    if first is None:
        return "\n".join(lines)
    section, name = first
    shown = name if section == short else f"{section}.{name}"
    lines += ["", "how values are given"]
    lines += _entry("command line", f"--{shown}=VALUE or --{shown} VALUE; a BOOL also bare")
    lines += _entry("-C, --config-file FILE", "YAML or JSON; may be repeated, the last one wins:")
    lines += [" " * 32 + line for line in (f"{section}:", f"  {name}: VALUE")]
    env = environment_name(f"{section}.{name}")
    lines += _entry("environment", f"{env}=VALUE; the released spelling, {section}.{name}=VALUE, works too")
    lines += _entry("", "The command line beats the file, the file beats the environment.")
    return "\n".join(lines)


def _user_help(config: _Config) -> str:
    lines: list[str] = []
    for namespace, paths in config.sections_to_entries.items():
        section = config.sections[namespace]
        title = ".".join(namespace) + (f": {section.desc}" if section and section.desc else "")
        lines += ["", title + (" (only if enabled)" if section and section.condition is not None else "")]
        for path in dict.fromkeys(paths):
            param = config.entries[path]
            facts = (["required"] if param.required else []) + [param.checker.help()]
            facts += [f"default {_show(param.default)}"] if param.default is not None else []
            left = "--" + ".".join(path) + ("[=BOOL]" if _is_switch(param) else "=VALUE")
            lines += _entry(left, f"{param.desc} [{'; '.join(facts)}]".strip())
    return "\n".join(["the module's own options", *lines]) if lines else "The module declares no options."


def _width() -> int:
    return max(80, min(100, shutil.get_terminal_size((96, 24)).columns))


def _wrap(text: str) -> list[str]:
    paragraphs = textwrap.dedent(text).strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), _width()) for part in paragraphs).split("\n")


def _entry(left: str, right: str) -> list[str]:
    """`  left      right`, wrapped, with the right column at 32; a long left gets a line of its own."""
    body = textwrap.wrap(" ".join(right.split()), _width() - 32, break_on_hyphens=False) or [""]
    if len(left) > 28:
        return ["  " + left, *(" " * 32 + line for line in body)]
    return [f"  {left:<30}{body[0]}", *(" " * 32 + line for line in body[1:])]
