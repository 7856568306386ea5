"""The command line: a YAML file, dotted arguments on top of it, and what is wrong with either said in one line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from typing import Any, NoReturn

from .config import Config

__all__ = ["Arguments", "parse"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was asked for."""

    config: Config
    dry_run: bool = False
    evaluate: bool = False


def parse(arguments: list[str] | None = None) -> Arguments:
    """Read the command line; what is wrong ends the program with status 2 and one line, before any work."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):  # type: ignore[misc, unused-ignore]
        def error(self, message: str, *_: object, **__: object) -> NoReturn:
            print(f"fastvlm-train: {said(message)}", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(
        prog="fastvlm-train",
        description="Train a vision-language model: contrast, matching, masked words, captions, questions.",
        epilog="Every value of a configuration is an argument: --optimizer.lr 3e-4. It runs under torchrun, too.",
    )
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="a YAML file; later arguments win")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print the plan, and stop")
    parser.add_argument("--eval", action="store_true", help="evaluate the newest checkpoint in output, and stop")
    parser.add_class_arguments(Config, None)
    given = parser.parse_args(arguments)
    try:  # classes that look at their values say what is wrong themselves
        built = vars(parser.instantiate(given) if hasattr(parser, "instantiate") else parser.instantiate_classes(given))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    fields = {f.name: built[f.name] for f in dataclasses.fields(Config)}
    config = Config(**fields)
    if built["eval"]:
        config = dataclasses.replace(config, resume="auto")
    return Arguments(config, built["dry_run"], built["eval"])


def names(of: Any = Config, prefix: str = "") -> list[str]:
    """Every name that a configuration has, with dots."""
    hints, found = typing.get_type_hints(of), []
    for field in dataclasses.fields(of):
        found.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            found += names(hints[field.name], f"{prefix}{field.name}.")
    return found


def said(message: str) -> str:
    """The parser's message in one line, with the names that a wrong one is like."""
    text = " ".join(message.split())
    wrong = re.search(r"(?:unrecognized arguments?: -*|does not accept option '|[Kk]ey [\"'])([\w.]+)", text)
    near = difflib.get_close_matches(wrong.group(1), names(), 3, 0.5) if wrong and wrong.group(1) not in names() else []
    return f"{text}; like it: {', '.join(near)}" if near else text
