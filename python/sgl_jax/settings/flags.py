"""Flags from a dataclass, whose fields have an About each: command line, environment, config file and documentation.

Imports nothing heavy, so that `--help` is instant, and reads no environment of its own.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from sgl_jax.settings.flag_parser import NOTHING, Elsewhere, FlagError, Mistakes, Parser, hint_about, many, option_named

HIDDEN = "***"

type Setting = str | int | float | bool | tuple[str, ...] | None  # a flag's value


class Rule(NamedTuple):
    """Limit on a flag's value; `text` completes the sentence "it must be …"."""

    holds: Callable[..., bool]  # takes a value of the flag's own type
    text: str


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"between {low} and {high}")


def at_least(low: int) -> Rule:
    return Rule(lambda value: value >= low, f"at least {low}")


NOT_NEGATIVE = Rule(lambda value: 0 <= value < float("inf"), "0 or more seconds")


class About(NamedTuple):
    """Describes a flag beyond its field's name, type and default."""

    help: str
    group: str = ""  # title of a group of flags, which begins here; empty: that of the flag before
    unset: str = ""  # effect of leaving the flag out, where the default value does not say it
    rule: Rule | None = None
    aliases: tuple[str, ...] = ()
    metavar: str = ""  # "PATH" also expands a leading ~; "JSON" takes a mapping of the config file
    refused: Mapping[str, str] = types.MappingProxyType({})  # values people try, and why they are not taken
    secret: bool = False
    per_host: bool = False  # may differ between the hosts of one engine; all others must be the same on each


REQUIRED: Any = dataclasses.MISSING  # as a flag's default


def flag[T: Setting](default: T | Callable[[], T], help: str, **about: Any) -> T:
    """Declare a dataclass field: its default value, or a function that makes it, and the fields of its About."""
    made = About(help, **about)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"about": made})
    return dataclasses.field(default=default, repr=not made.secret, metadata={"about": made})


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list of texts"}
_METAVARS = {int: "N", float: "X", bool: ""}
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Flag(NamedTuple):
    """Field of the dataclass, as the command line, the checks and the documentation see it."""

    field: dataclasses.Field[Any]
    about: About
    kind: type
    optional: bool
    choices: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def option(self) -> str:
        return option_named(self.name)

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option, *self.about.aliases)

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return self.about.metavar or _METAVARS.get(self.kind, "TEXT")

    @property
    def required(self) -> bool:
        return self.field.default is self.field.default_factory is dataclasses.MISSING

    @property
    def default_text(self) -> str:
        """The default in words."""
        if self.required:
            return "required"
        if self.about.unset:
            return f"default: {self.about.unset}"
        if self.kind is bool:
            return f"default: {'on' if self.field.default else 'off'}"
        return f"default: {self.field.default}"

    @property
    def refusals(self) -> list[str]:
        """A sentence for each reason why values are not taken."""
        by_reason = itertools.groupby(self.about.refused, self.about.refused.__getitem__)
        return [f"Refused: `{'`, `'.join(values)}` ({reason})" for reason, values in by_reason]

    def is_default(self, value: Setting) -> bool:
        if self.field.default_factory is not dataclasses.MISSING:
            return value == self.field.default_factory()
        return not self.required and value == self.field.default

    def shown[T](self, value: T) -> T | str:
        return HIDDEN if value is not None and self.about.secret else value

    def said(self, value: object) -> str:
        return f"{self.option} is {self.shown(value)}"

    def read(self, value: object) -> object:
        """Read text from outside as this flag's type. Text that cannot be read is returned, for `check` to refuse."""
        if self.kind is tuple:
            return many(value)
        if isinstance(value, dict) and self.about.metavar == "JSON":  # a mapping in the config file
            return json.dumps(value)
        if not isinstance(value, str):
            return value
        if self.kind is bool:
            return _TRUTH.get(value.lower(), value)
        if self.kind is str:
            return os.path.expanduser(value) if self.about.metavar == "PATH" else value
        try:
            return self.kind(value)
        except ValueError:
            return value

    def check(self, value: object) -> None:
        """Raise FlagError unless the value is of the type, among the choices and within the limit."""
        if value is None and self.optional:
            return
        said = self.said(value)
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            raise FlagError(self.option, f"{said}; it must be {_KINDS[self.kind]}")
        if isinstance(value, tuple) and not all(isinstance(each, str) and each for each in value):
            raise FlagError(self.option, f"{said}; each of its values must be text, and not empty")
        if value == "":
            raise FlagError(self.option, f"{self.option} is empty; give a value or leave the flag out")
        if reason := self.about.refused.get(str(value)):
            raise FlagError(self.option, f"{said}; {reason}")
        if self.choices and value not in self.choices:
            taken = [choice for choice in self.choices if choice not in self.about.refused]
            raise FlagError(self.option, f"{said}; it must be {' or '.join(taken)}")
        if self.about.rule and not self.about.rule.holds(value):
            raise FlagError(self.option, f"{said}; it must be {self.about.rule.text}")


def flags_of(cls: type) -> tuple[Flag, ...]:
    """Read the fields of the class."""
    hints, group = typing.get_type_hints(cls), ""
    flags = []
    for field in dataclasses.fields(cls):
        about: About = field.metadata["about"]
        group = about.group or group
        kinds = typing.get_args(hints[field.name])
        optional, choices = types.NoneType in kinds, ()
        kind = next(each for each in kinds if each is not types.NoneType) if optional else hints[field.name]
        if typing.get_origin(kind) is Literal:
            kind, choices = str, typing.get_args(kind)
        kind = typing.get_origin(kind) or kind  # tuple[str, ...] is a tuple
        flags.append(Flag(field, about._replace(group=group), kind, optional, choices))
    return tuple(flags)


def mistakes_in(flags: Sequence[Flag], values: Mapping[str, object], source: Callable[[str], str]) -> Mistakes:
    """Return an error for each of the values, by field name, that is refused. `source` says where a field's value was set, or
    returns an empty text."""
    found: Mistakes = []
    for each in (flag for flag in flags if flag.name in values):
        try:
            each.check(values[each.name])
        except FlagError as error:
            found.append(FlagError(error.flag, f"{error}{source(each.name)}"))
    return found


# --- where values come from: each reader returns raw values by field name, and adds to `mistakes` ---------------------


def read_command_line(
    flags: Sequence[Flag], argv: Sequence[str], mistakes: Mistakes, elsewhere: Elsewhere, **texts: str
) -> dict[str, str | bool | list[str]]:
    """Return the flags given in `argv`, as text, and --config under "config". `--help` and `--version` print and exit.
    `texts` are argparse's usage, description and epilog."""
    parser = Parser(
        usage=texts.get("usage"),
        description=texts.get("description"),
        epilog=texts.get("epilog"),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    general = parser.add_argument_group("General")
    general.add_argument("-h", "--help", action="help", help="show this text and exit")
    general.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    general.add_argument("--config", metavar="FILE", help="a YAML file of flags, one 'page-size: 16' per line")
    for title, members in itertools.groupby(flags, key=lambda each: each.about.group):
        group = parser.add_argument_group(title)
        for each in members:
            text = ". ".join((f"{each.about.help} ({each.default_text})", *each.refusals))
            if each.kind is bool:
                group.add_argument(*each.options, dest=each.name, action="store_true", help=text)
                off = f"--no-{each.option.removeprefix('--')}"
                group.add_argument(off, dest=each.name, action="store_false", help=argparse.SUPPRESS)
            else:
                nargs, action = ("+", "extend") if each.kind is tuple else (None, "store")
                shown = each.metavar
                group.add_argument(*each.options, dest=each.name, metavar=shown, help=text, nargs=nargs, action=action)
    given, unknown = parser.parse_known_args(argv)
    mistakes += parser.unknown(unknown, argv, elsewhere)
    return vars(given)


class _ShowVersion(argparse.Action):
    """Print the version. It is in the package's metadata, and their reader is too slow to import for every `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from sgl_jax import __version__

        print(f"sgl_jax {__version__}")
        parser.exit()


def read_environ(
    flags: Sequence[Flag], environ: Mapping[str, str], prefix: str, mistakes: Mistakes, elsewhere: Elsewhere = NOTHING
) -> dict[str, str]:
    """Return the flags set by variables, as text. An empty one counts as unset: compose files and charts leave it so."""
    # Kubernetes describes each Service of a namespace in variables that begin with the Service's name. One called sgl-jax
    # sets SGL_JAX_PORT=tcp://10.0.0.1:30000 and more, which are no flags.
    port = r"PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?"
    service_link = re.compile(rf"{prefix}(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|{port})")
    names = {variable_name(flag, prefix): flag.name for flag in flags} | {f"{prefix}CONFIG": "config"}
    found = {}
    for variable, value in environ.items():
        if not variable.startswith(prefix) or not value:
            continue
        if service_link.fullmatch(variable) and (variable not in names or "://" in value):
            continue
        if variable not in names:
            options = {option_named(name): variable for variable, name in names.items()}
            hint = hint_about(option_named(variable.removeprefix(prefix).lower()), options, elsewhere)
            mistakes.append(FlagError(variable, f"the environment variable {variable} names no flag{hint}"))
        else:
            found[names[variable]] = value
    return found


def variable_name(flag: Flag, prefix: str) -> str:
    return prefix + flag.name.upper()


def read_config(flags: Sequence[Flag], path: str, mistakes: Mistakes, elsewhere: Elsewhere) -> dict[str, object]:
    """Return the flags set in a YAML file, whose keys are flag names or aliases, with - or _. Null counts as not given."""
    import yaml

    names = {option: flag.name for flag in flags for option in flag.options}
    said = f"--config is {path}"
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise FlagError("--config", f"{said}; it cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlagError("--config", f"{said}; it is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise FlagError("--config", f"{said}; it must hold lines like 'page-size: 16'")
    found = {}
    for key, value in (content or {}).items():
        option = option_named(str(key))
        if (name := names.get(option)) is None:
            options = {option: option.removeprefix("--") for option in names}
            hint = hint_about(option, options, elsewhere) or "; --help lists them all"
            mistakes.append(FlagError("--config", f"{said}; its key {key} is not a flag{hint}"))
        elif name in found:
            mistakes.append(FlagError("--config", f"{said}; it sets {name.replace('_', '-')} twice, keep one"))
        else:
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}
