"""Reader of command lines that says what is wrong with one, for the server's flags and every tool's own."""

import argparse
import itertools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence

type Elsewhere = Mapping[str, str]  # pattern of other programs' flags -> the end of the sentence "… is not a flag: …"
NOTHING: Elsewhere = types.MappingProxyType({})


class FlagError(ValueError):
    """A flag or value that cannot be honoured; the message states flag, value, limit and what to do."""

    def __init__(self, flag: str, message: str):
        super().__init__(message)
        self.flag = flag  # as on the command line, the first of several; empty when the error is about none


type Mistakes = list[FlagError]


def refuse(mistakes: Sequence[FlagError]) -> None:
    """Raise the mistake, or one error that says all of them, a line each. Does nothing without a mistake."""
    if len(mistakes) > 1:
        raise FlagError(mistakes[0].flag, "\n  ".join((f"{len(mistakes)} mistakes:", *map(str, mistakes))))
    for mistake in mistakes:
        raise mistake


class Parser(argparse.ArgumentParser):
    """Parser that raises FlagError, a line with a hint, where argparse prints the usage and ends the process."""

    def error(self, message: str) -> typing.NoReturn:
        option, _, said = message.removeprefix("argument ").partition(": ")
        if said.startswith("ignored explicit argument"):  # argparse's words for --switch=true, which is an error
            raise self._takes_no_value(option.split("/")[0])
        raise FlagError("", message.removeprefix("argument "))

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Read the command line of a tool that has no flags but these; None: this process's."""
        argv = sys.argv[1:] if argv is None else argv
        found, unknown = self.parse_known_args(argv)
        refuse(self.unknown(unknown, argv))
        return found

    def unknown(self, words: Sequence[str], argv: Sequence[str], elsewhere: Elsewhere = NOTHING) -> list[FlagError]:
        """Return the errors about `words`, those of `argv` that could not be read. A word behind an unknown flag is its
        value."""
        flags = [word for word in words if _is_flag(word)]
        values = {word for before, word in itertools.pairwise(argv) if before in flags}
        wrong = [word for word in words if word in flags or word not in values]
        return [self._unknown_flag(word, elsewhere) if word in flags else self._stray(word, argv) for word in wrong]

    def _stray(self, word: str, argv: Sequence[str]) -> FlagError:
        for before, at in itertools.pairwise(argv):
            action = self._option_string_actions.get(before)
            if at == word and action is not None and action.nargs == 0:
                return self._takes_no_value(before)
        needs_model = "--model-path" in self._option_string_actions and not any("--model" in each for each in argv)
        cure = f"write --model-path {word}" if needs_model else "every value needs one"
        return FlagError("", f"{word!r} follows no flag; {cure}")

    def _unknown_flag(self, word: str, elsewhere: Elsewhere) -> FlagError:
        word = word.partition("=")[0]
        options = {option: option for option in self._option_string_actions}
        hint = hint_about(word, options, elsewhere) or "; --help lists them all"
        return FlagError(word, f"{word} is not a flag{hint}")

    def _takes_no_value(self, switch: str) -> FlagError:
        off = f"--no-{switch.removeprefix('--')}"
        hint = f"; {off} turns it off" if off in self._option_string_actions else ""
        return FlagError(switch, f"{switch} takes no value{hint}")


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()  # -1 is a value


def many(value: object) -> object:
    """Read several values: a list, whose objects become JSON, or text: a JSON list, one JSON object, or words."""
    if isinstance(value, str) and value[:1] not in ("[", "{"):
        return tuple(value.split())
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list):
        return value
    return tuple(json.dumps(each) if isinstance(each, dict) else each for each in entries)


def option_named(name: str) -> str:
    return "--" + name.replace("_", "-")


def said_of(option: str, patterns: Elsewhere) -> str:
    """Return the hint about another program's flag or a feature that is not built: the text of the first pattern that the
    option matches, or an empty text."""
    import fnmatch

    return next((said for pattern, said in patterns.items() if fnmatch.fnmatchcase(option, pattern)), "")


def hint_about(option: str, options: Mapping[str, str], elsewhere: Elsewhere) -> str:
    """Return the end of an error message about an unknown option: the answer to another program's flag, else the value in
    `options` of the option that is most like it, else nothing."""
    import difflib

    if said := said_of(option, elsewhere):
        return f": {said}"
    # 0.75: --max-model-len is not like --max-total-tokens
    close = next(iter(difflib.get_close_matches(option, options, n=1, cutoff=0.75)), None)
    return f", did you mean {options[close]}?" if close else ""
