"""Tables in the docs that come from the code: `python tests/docs.py` writes them, and a test compares."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

from forebay.cli.problems import ExitCode
from forebay.cli.settings import settings_types
from forebay.kit.config import SECTIONS, Settings
from forebay.kit.failure import Failure, Internal

ROOT = Path(__file__).parent.parent


def failures() -> str:
    """Returns the table of every failure."""
    lines = ["| reason | code | whose | elsewhere | meaning |", "| --- | --- | --- | --- | --- |"]
    classes: list[type[Failure]] = []
    pending = list(Failure.__subclasses__())
    while pending:
        kind = pending.pop(0)
        if "reason" in vars(kind) or kind is Internal:  # a package's own subclasses only say more
            classes.append(kind)
        pending.extend(kind.__subclasses__())
    for kind in classes:
        first_line = (kind.__doc__ or "").strip().splitlines()[0]
        elsewhere = "yes" if kind.elsewhere else ""
        lines.append(
            f"| {kind.reason} | {kind.code.name} | {kind.fault.value} | {elsewhere} | {first_line} |"
        )
    return "\n".join(lines)


def _default(kind: type[Settings], name: str) -> object:
    field = kind.model_fields[name]
    if field.is_required():
        return None
    made = kind.model_construct()
    return kind.__pydantic_serializer__.to_python(made, mode="json", warnings=False)[name]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
            if value
            else "{}"
        )
    return json.dumps(value, ensure_ascii=False)


def _inner(kind: type[Settings], name: str) -> tuple[type[Settings] | None, str]:
    """Returns the settings inside a field, if there are any, and whether as one, a `list` or a `table`."""
    annotation = kind.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation, "one"
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, Settings):
            return argument, "table" if str in get_args(annotation) else "list"
    return None, ""


def exit_codes() -> str:
    """Returns the table of what the command exits with. Its meanings are the strings below the members."""
    lines = ["| code | meaning |", "| --- | --- |"]
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(ExitCode))).body
    assert isinstance(tree, ast.ClassDef)
    for code, meaning in zip(tree.body[1::2], tree.body[2::2], strict=True):
        assert isinstance(code, ast.Assign)
        assert isinstance(code.value, ast.Constant)
        assert isinstance(meaning, ast.Expr)
        assert isinstance(meaning.value, ast.Constant)
        text = str(meaning.value.value).replace("|", "\\|")
        lines.append(f"| {code.value.value} | {text} |")
    return "\n".join(lines)


_MARKS = {"one": "", "list": "[]", "table": ".NAME"}


def _keys(kind: type[Settings], path: str = "") -> Iterator[tuple[str, type[Settings], str]]:
    for name in kind.model_fields:
        inner, shape = _inner(kind, name)
        if inner is None or shape != "one":
            yield f"{path}{name}", kind, name
        if inner is not None:
            yield from _keys(inner, f"{path}{name}{_MARKS[shape]}.")


def section(name: str) -> str:
    """Returns the table of the keys of a section of the configuration."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for path, kind, key in _keys(settings_types()[name]):
        field = kind.model_fields[key]
        value = _default(kind, key)
        shown = "required" if field.is_required() else "unset" if value is None else f"`{_toml(value)}`"
        meaning = " ".join((field.description or "").split())
        lines.append(
            f"| `{path}` | {shown.replace('|', chr(92) + '|')} | {meaning.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)


def example() -> str:
    """Returns a configuration file with every key, its meaning and its default, all commented out."""
    parts = [
        "# Every key of Forebay's configuration, with its meaning and its default.",
        "# Copy it to forebay.toml, in the working directory or your configuration folder, and uncomment",
        "# what you change. The environment goes before the file: FOREBAY_MLX__MAX_ROWS=4.",
        '# Durations are "250ms", "1.5s", "2m" or "1h"; sizes are "512MiB" or "4GiB".',
    ]
    for name, kind in settings_types().items():
        parts += ["", *_example_section(f"[{name}]", kind, name)]
    return "\n".join(parts) + "\n"


def _example_section(header: str, kind: type[Settings], path: str) -> list[str]:
    lines = [f"# {line}" for line in textwrap.wrap((kind.__doc__ or "").strip().splitlines()[0], 108)]
    lines.append(header)
    nested: list[str] = []
    for name, field in kind.model_fields.items():
        inner, shape = _inner(kind, name)
        if inner is not None:
            mark = {"one": "[{}]", "list": "[[{}]]", "table": '[{}."NAME"]'}[shape]
            commented = _example_section(f"# {mark.format(f'{path}.{name}')}", inner, f"{path}.{name}")
            nested += ["", *commented]
            continue
        lines += [f"# {line}" for line in textwrap.wrap(" ".join((field.description or "").split()), 108)]
        value = _default(kind, name)
        lines.append(f"# {name} =" if value is None else f"# {name} = {_toml(value)}")
    return lines + nested


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "exit-codes": ("docs/command.md", exit_codes),
    "failures": ("docs/protocol.md", failures),
    **{name: ("docs/configuration.md", partial(section, name)) for name in SECTIONS},
}
EXAMPLE = ROOT / "forebay.example.toml"


def fill(name: str) -> tuple[Path, str, str]:
    """Returns a page, its text, and its text with the named table as the code has it."""
    page, make = TABLES[name]
    path = ROOT / page
    old = path.read_text()
    mark = f"<!-- table:{name} -->"
    new = re.sub(
        rf"{re.escape(mark)}\n(?:\n\|(?:.*\n)+?(?=\n))?",
        lambda _: f"{mark}\n\n{make()}\n",
        old,
        count=1,
    )
    return path, old, new


if __name__ == "__main__":
    for table in sys.argv[1:] or TABLES:
        page_path, _, text = fill(table)
        page_path.write_text(text)
    EXAMPLE.write_text(example())
