"""The error type that people see.

Everything that a user can get wrong (a file, an option, a plan that contradicts itself) is an
`InputError`: one clear message that names the place, what was expected and the nearest valid
choice. The command line prints it without a traceback and exits with code 2. Anything else that
escapes is a bug of the simulator.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence


class SimulatorError(Exception):
    """Base class of all errors that the simulator raises on purpose."""


class InputError(SimulatorError, ValueError):
    """The user's input is wrong.

    Parameters
    ----------
    problem:
        What is wrong and what was expected, one sentence.
    place:
        Where: a file, a dotted key, a column; printed before the problem.
    """

    def __init__(self, problem: str, *, place: str | None = None) -> None:
        self.problem = problem
        self.place = place
        super().__init__(f"{place}: {problem}" if place else problem)

    def at(self, place: str) -> InputError:
        """The same error with `place` put before its own place."""
        inner = f"{place}: {self.place}" if self.place else place
        return InputError(self.problem, place=inner)


class InputErrors(InputError):
    """Several errors of one input, reported together, one per line."""

    def __init__(self, errors: Sequence[InputError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(error) for error in self.errors))


@contextlib.contextmanager
def gathered(errors: list[InputError]) -> Iterator[None]:
    """Put what is raised inside into `errors` in place of raising it; for `raise_all` later."""
    try:
        yield
    except InputErrors as several:
        errors += several.errors
    except InputError as error:
        errors.append(error)


def raise_all(errors: Sequence[InputError]) -> None:
    """Raise nothing, the single error, or all of them as one `InputErrors`."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InputErrors(errors)


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, or None if nothing is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    matches = difflib.get_close_matches(name.casefold(), list(by_folded), n=1, cutoff=0.5)
    return by_folded[matches[0]] if matches else None


def unknown_name(
    kind: str, name: str, choices: Iterable[str], *, place: str | None = None
) -> InputError:
    """An `InputError` for a name that is not among `choices`, with the nearest valid one."""
    known = sorted(choices)
    guess = nearest(name, known)
    hint = f"; did you mean {guess!r}?" if guess else ""
    if len(known) > 16 and kind in _LISTED:
        listing = f"{len(known)} known: simulator list {_LISTED[kind]}"
    else:
        listing = f"choose from: {', '.join(known)}"
    return InputError(f"unknown {kind} {name!r}{hint} ({listing})", place=place)


#: What `simulator list` calls the kinds of names that it lists.
_LISTED = {
    "model": "models",
    "accelerator": "accelerators",
    "topology": "topologies",
    "schedule": "schedules",
    "framework": "frameworks",
}
