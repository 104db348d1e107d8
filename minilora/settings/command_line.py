"""From a command line and its YAML or JSON file to checked settings.

LLaMA-Factory's ways of writing them all work: `--key value`, `--key=value`, `--flag`, `key=value`.
"""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any

from minilora.settings.errors import RequestError
from minilora.settings.fields import BOOLEANS, kind_of, typed
from minilora.settings.foreign_keys import (
    ALIASES,
    EXPLAINED,
    IGNORED,
    IGNORED_PREFIXES,
    OFF,
    REFUSED,
    asks_for_nothing,
)
from minilora.settings.keys import GROUPS, TEMPLATES, all_settings
from minilora.settings.settings import ContradictionError, Settings
from minilora.settings.settings_file import NULL, Given, Raw, read_file

# The keys without a default, by command.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "train": ("model_name_or_path", "dataset", "output_dir"),
    "plan": ("model_name_or_path",),
    "preview": ("model_name_or_path", "dataset"),
}
COMMAND_LINE = "command line"


def read_settings(argv: Sequence[str], command: str) -> Settings:
    """Read the settings of `python -m minilora.<command>` from its arguments and their file.

    `--help` prints every key and raises SystemExit(0).
    Raises RequestError with every problem of the file and the command line together.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(command))
        raise SystemExit(0)

    path, overrides, problems = parse_command_line(argv)
    given: dict[str, Given] = {}
    required = REQUIRED[command]
    if path is not None:
        try:
            given, repeated = read_file(path)
            problems += repeated
        except RequestError as error:
            problems += error.problems
            required = ()  # they may stand in the file that could not be read
    given |= overrides
    given.pop("local_rank", None)  # launchers add it; the environment says the same

    settings, more_problems = _settings_of(given)
    problems += more_problems
    for key in required:
        if key not in given or given[key].raw is None:
            problems.append(f"{key} is missing: give it in the file or as --{key} VALUE")
    if problems:
        raise RequestError(problems + (_template_problems(given) if "dataset" in required else []))
    return settings


def _template_problems(given: Mapping[str, Given]) -> list[str]:
    """What is wrong with the template of a request that is refused anyway."""
    raw = {key: value.raw for key, value in given.items()}
    model, template = raw.get("model_name_or_path"), raw.get("template")
    known = template is None or template in TEMPLATES  # another name has been refused by now
    if not isinstance(model, str) or not known or raw.get("stage", "sft") != "sft":
        return []
    # Only a wrong request pays for these imports.
    from minilora.data.template_check import template_problems

    return template_problems(model, None if template is None else str(template))


def read_options(
    parser: ArgumentParser, argv: Sequence[str] | None, command: str
) -> tuple[Namespace, Settings]:
    """A command's own options, and the settings that the other arguments give.

    Raises what `read_settings` raises.
    """
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if "--help" in rest or "-h" in rest:
        parser.print_help()
    return own, read_settings(rest, command)


def parse_command_line(argv: Sequence[str]) -> tuple[str | None, dict[str, Given], list[str]]:
    """Split arguments into the settings file, the keys given (the last one wins) and problems."""
    kinds = {item.name: kind_of(item)[0] for _, item in all_settings()}
    path: str | None = None
    given: dict[str, Given] = {}
    problems = []

    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")

        if word.startswith("--") and key:
            key = key.replace("-", "_")
            raw = value if equals else _value_after(words, kinds.get(key))
            if raw is None:
                problems.append(f"--{key} ({COMMAND_LINE}): a value is missing: --{key} VALUE")
            else:
                given[key] = _given(raw)
        elif equals and key.isidentifier():
            given[key] = _given(value)
        elif path is None and not word.startswith("-"):
            path = word
        else:
            problems.append(
                f"{word!r} ({COMMAND_LINE}) is not understood: write --key value, after at most "
                "one settings file"
            )
    return path, given, problems


def _given(raw: str) -> Given:
    """A word of the command line. Empty text stays text there: only a file has empty values."""
    value: Raw = None if raw in NULL and raw else raw
    return Given(value, COMMAND_LINE)


def _value_after(words: list[str], kind: type | None) -> str | None:
    """Take the value of `--key` off the words that follow it; None if there is none.

    kind: the key's type, None for a key that is not known. A flag without a value is true, so a
    true-or-false setting takes only words that are values of one: what follows may be the file.
    """
    following = words[0] if words else "--"
    if kind is bool:
        is_value = following.lower() in (*BOOLEANS, *NULL)
    else:
        is_value = not following.startswith("--")

    if is_value:
        return words.pop(0)
    return "true" if kind in (bool, None) else None


def _settings_of(given: Mapping[str, Given]) -> tuple[Settings, list[str]]:
    """Type and check the given values; where there are problems the settings mean nothing."""
    known, problems, notices = _without_foreign_keys(given)
    # Keys that were given in a way that cannot be read; their defaults say nothing of the request.
    unread = _perhaps_meant(given)

    values: dict[str, Any] = {}
    for _, item in all_settings():
        if item.name in known and not _says_nothing(item, known[item.name].raw):
            try:
                values[item.name] = typed(item, known[item.name].raw)
            except ValueError as error:
                problems.append(f"{item.name} ({known[item.name].origin}): {error}")
                unread.add(item.name)

    schedule = values.get("lr_scheduler_type")
    if schedule == "constant" and (values.get("warmup_steps") or values.get("warmup_ratio")):
        notices.append("lr_scheduler_type constant has no warm-up; see constant_with_warmup")

    groups = {}
    for group, declaration in GROUPS.items():
        names = [item.name for item in fields(declaration) if item.name in values]
        groups[group] = declaration(**{name: values[name] for name in names})
    origins = {key: known[key].origin for key in values}
    try:
        return Settings(**groups, notices=tuple(notices), origins=origins), problems
    except ContradictionError as error:
        # A contradiction with the default of such a key would be a second error that is none.
        sound = [line for line in error.problems if not any(key in line for key in unread)]
        return Settings(), problems + sound
    except RequestError as error:
        return Settings(), problems + list(error.problems)


def _says_nothing(item: Field[Any], raw: Raw) -> bool:
    """Whether a value leaves a setting at its default: null, or an empty list that means none."""
    optional = item.default is None or item.default in ((), ("none",))
    return raw is None or (kind_of(item)[0] is tuple and optional and raw in ([], "[]"))


def _perhaps_meant(given: Mapping[str, Given]) -> set[str]:
    """The settings that misspelt keys were perhaps meant to be."""
    names = [item.name for _, item in all_settings()]
    strangers = (key for key in given if key not in names and key not in ALIASES)
    close = (difflib.get_close_matches(key, names, n=1) for key in strangers)
    return {match[0] for match in close if match}


def _without_foreign_keys(
    given: Mapping[str, Given],
) -> tuple[dict[str, Given], list[str], list[str]]:
    """The keys that are settings; and the problems and notices that the others cause."""
    names = [item.name for _, item in all_settings()]
    settings: dict[str, Given] = {}
    problems: list[str] = []
    notices: list[str] = []
    ignored: list[str] = []

    for key, value in given.items():
        where = f"{key} ({value.origin})"
        if key in names:
            settings.setdefault(key, value)
        elif key in ALIASES:
            name = ALIASES[key]
            if name in given and given[name].raw != value.raw:
                problems.append(f"{where} is the older name of {name}; give one of them")
            settings.setdefault(name, value)
        elif key == "neat_packing":
            if not asks_for_nothing(value.raw, OFF):
                settings["packing"] = Given("true", value.origin)
                notices.append(
                    "neat_packing means packing: packed documents never see each other here"
                )
        elif key in REFUSED:
            refusal = REFUSED[key]
            if not asks_for_nothing(value.raw, refusal.harmless):
                problems.append(f"{where}: {value.raw!r} is not supported: {refusal.remedy}")
        elif key in EXPLAINED:
            if not asks_for_nothing(value.raw, OFF):
                notices.append(f"{key} means nothing here: {EXPLAINED[key]}")
        elif key in IGNORED or key.startswith(IGNORED_PREFIXES):
            ignored.append(key)
        else:
            known = [*names, "neat_packing", *ALIASES, *REFUSED, *IGNORED, *EXPLAINED]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists every key"
            problems.append(f"{where} is not a known key: {hint}")

    if ignored:
        notices.append(f"ignored, they mean nothing here: {', '.join(sorted(ignored))}")
    return settings, problems, notices


def help_text(command: str) -> str:
    """Every key of a command with its meaning, choices and default, one line each."""
    lines = [
        f"usage: python -m minilora.{command} [CONFIG.yaml | CONFIG.json] [--key value ...]",
        "CONFIG holds the same keys, one `key: value` per line; --key value overrides it.",
    ]
    for group, declaration in GROUPS.items():
        lines += ["", f"{group}:"]
        for item in fields(declaration):
            line = f"  --{item.name:<28} {item.metadata['help']}"
            if item.metadata["choices"]:
                line += f" One of {', '.join(item.metadata['choices'])}."
            if item.default not in (None, ()):
                line += f" [{_shown(item.default)}]"
            lines.append(line)
    return "\n".join(lines)


def _shown(value: object) -> str:
    """A default as a user would write it."""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
