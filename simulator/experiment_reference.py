"""The reference of the experiment file, made from the dataclasses of `simulator.experiment`.

python -m simulator.experiment_reference > docs/experiment.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from simulator import experiment as module
from simulator.schedules import describe, names

#: Sections of the page: the key of the section, its dataclass, its heading.
SECTIONS: tuple[tuple[str, type, str], ...] = (
    ("", module.Experiment, "The experiment"),
    ("cluster", module.Cluster, "cluster"),
    ("cluster.faults[]", module.Fault, "cluster.faults"),
    ("parallel", module.Parallel, "parallel"),
    ("parallel.overlap", module.Overlap, "parallel.overlap"),
    ("training", module.Training, "training"),
    ("jitter", module.Jitter, "jitter"),
    ("jobs[]", module.Job, "jobs"),
)

_HEAD = """\
# The experiment file

<!-- Made by `python -m simulator.experiment_reference`; edit the docstrings of
simulator/experiment.py instead. -->

YAML, or the dataclasses of the same names (`simulator.Experiment`, `simulator.Cluster`, …). Only
`model` and `cluster.topology` must be given. A default of – means: derived, or taken from the
model, the topology or the framework profile, as the text says. Keys change on the command line,
`--set parallel.tensor=4`, and in Python, `experiment.replace(**{"parallel.tensor": 4})`.
Unknown keys, wrong types and contradictions are errors, each with its line; all unknown keys and
wrong types of a file are reported at once, with its names that are in no catalogue. Paths are
relative to the file.
"""


def attribute_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each attribute of a class, by attribute, as one line."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for item, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[item.target.id] = " ".join(following.value.value.split())
    return docs


def type_text(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [bound for extra in args[1:] for bound in _bounds(extra)]
        return " ".join([type_text(args[0]), ", ".join(bounds)]).rstrip()
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(item) for item in args if item is not type(None))
    if origin is tuple:
        items = [item for item in args if item is not Ellipsis]
        if Ellipsis in args:
            return f"list of {_plural(type_text(items[0]))}"
        return f"list of {len(items)} {_plural(type_text(items[0]))}"
    if dataclasses.is_dataclass(hint):
        return "mapping"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(hint, str(hint))


def _bounds(extra: Any) -> list[str]:
    """The bounds that a pydantic constraint or field states, in words a reader of YAML knows."""
    metadata = getattr(extra, "metadata", [extra])
    found = {name: getattr(item, name) for item in metadata for name in _BOUNDS
             if getattr(item, name, None) is not None}  # fmt: skip
    if found.get("gt") == 0 and isinstance(found["gt"], int) and len(found) == 1:
        return ["≥ 1"]
    return [f"{sign} {found[name]:g}" for name, sign in _BOUNDS.items() if name in found]


_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _plural(text: str) -> str:
    return f"{text}s"


def default_text(item: dataclasses.Field[Any]) -> str:
    """The default as YAML writes it; `required` if there is none."""
    if item.default is dataclasses.MISSING:
        return "required" if item.default_factory is dataclasses.MISSING else "–"
    if item.default is None or item.default == "" or item.default == ():
        return "–"
    if isinstance(item.default, bool):
        return f"`{str(item.default).lower()}`"
    return f"`{item.default}`"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _schedule_options() -> list[str]:
    """The options of every schedule that has any."""
    described = (describe(name) for name in names())
    rows = [_row((f"`{kind.name}`", f"`{option}`", text))
            for kind in described for option, text in kind.options.items()]  # fmt: skip
    head = "\n### `parallel.schedule_options`\n\nBy schedule:\n"
    return [head, "| schedule | option | meaning |\n|---|---|---|", *rows]


def reference() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for prefix, cls, title in SECTIONS:
        docs, hints = attribute_docs(cls), typing.get_type_hints(cls, include_extras=True)
        summary = re.sub(r"\s+", " ", (cls.__doc__ or "").strip())
        heading = title if not prefix else f"`{title}`"
        parts.append(f"\n## {heading}\n\n{summary}\n")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|")
        for item in dataclasses.fields(cls):
            name = f"{prefix}.{item.name}" if prefix else item.name
            cells = (f"`{name}`", type_text(hints[item.name]), default_text(item), docs[item.name])
            parts.append(_row(cells))
        if prefix == "parallel":
            parts += _schedule_options()
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
