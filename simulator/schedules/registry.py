"""The names of schedules, and how a new one joins them.

A schedule is one function from `(ranks, microbatches, virtual, **options)` to the orders of all
ranks, with a `register` decorator that states what is true of it apart from the order.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from pydantic import TypeAdapter, ValidationError

from simulator.errors import InputError, nearest, unknown_name
from simulator.schedules.actions import Action, Overlap
from simulator.schedules.schedule import Schedule

RankOrders = list[list[Action | Overlap]]
Builder = Callable[..., RankOrders]
Placement = Callable[[int, int], tuple[int, ...]]


def loop(ranks: int, virtual: int) -> tuple[int, ...]:
    """Stage s on rank s mod p (PyTorch's "loop" style, Megatron's interleaving)."""
    return tuple(stage % ranks for stage in range(ranks * virtual))


def wave(ranks: int, virtual: int) -> tuple[int, ...]:
    """Down the ranks and up again (PyTorch's "v" style for two chunks, Hanayo's waves)."""
    return tuple(
        stage % ranks if stage // ranks % 2 == 0 else ranks - 1 - stage % ranks
        for stage in range(ranks * virtual)
    )


def opposite(ranks: int, virtual: int) -> tuple[int, ...]:
    """Two copies of the model: one from rank 0 to p-1, the other from p-1 to 0."""
    del virtual
    return (*range(ranks), *reversed(range(ranks)))


#: Most forward passes of a schedule; more do not fit into memory.
MOST_PASSES = 10_000_000


@dataclass(frozen=True)
class ScheduleKind:
    """What is known of a named schedule.

    Attributes
    ----------
    name, summary, reference:
        Registered name, one sentence, and where it was published.
    constraint:
        The sizes for which it is defined, as a sentence.
    chunks:
        Allowed chunks per rank: `"1"`, `"2"`, `"any"` or `"even"`.
    splits_backward:
        Whether it has I and W actions in place of (some) B.
    pytorch:
        Its class in `torch.distributed.pipelining`, if there is one.
    memory:
        Peak activations in flight per rank, as a formula.
    options:
        The keyword options that its builder takes: name and one line of help.
    """

    name: str
    summary: str
    reference: str
    constraint: str
    chunks: str
    splits_backward: bool
    pytorch: str | None
    memory: str
    weight_copies: int
    flush: bool
    placement: Placement
    builder: Builder
    options: Mapping[str, str]

    @property
    def default_virtual(self) -> int:
        """Chunks per rank where nothing was asked for."""
        return 1 if self.chunks in ("1", "any") else 2

    @property
    def needs_durations(self) -> bool:
        """Whether the order depends on the durations of the actions."""
        return "durations" in self.options


_KINDS: dict[str, ScheduleKind] = {}
_ALIASES: dict[str, str] = {}


def register(
    name: str,
    *,
    summary: str,
    reference: str,
    constraint: str = "none",
    chunks: str = "1",
    splits_backward: bool = False,
    pytorch: str | None = None,
    memory: str = "",
    weight_copies: int = 1,
    flush: bool = True,
    placement: Placement = loop,
    aliases: tuple[str, ...] = (),
) -> Callable[[Builder], Builder]:
    """Give a schedule function a name; see `ScheduleKind` for the arguments.

    Options of the function are `Annotated` with their line of help.
    """

    def decorate(builder: Builder) -> Builder:
        _KINDS[name] = ScheduleKind(
            name=name,
            summary=summary,
            reference=reference,
            constraint=constraint,
            chunks=chunks,
            splits_backward=splits_backward,
            pytorch=pytorch,
            memory=memory,
            weight_copies=weight_copies,
            flush=flush,
            placement=placement,
            builder=builder,
            options=_helps(builder),
        )
        for alias in (name, *aliases, *((pytorch, f"Schedule{pytorch}") if pytorch else ())):
            _ALIASES.setdefault(_folded(alias), name)
        return builder

    return decorate


def _helps(builder: Builder) -> dict[str, str]:
    """The help of each option of a schedule's function, with its default."""
    options = list(inspect.signature(builder).parameters.values())[3:]
    hints = typing.get_type_hints(builder, include_extras=True) if options else {}
    helps: dict[str, str] = {}
    for option in options:
        (text, *_) = getattr(hints.get(option.name), "__metadata__", ("",))
        default = "" if option.default is None else f"Default: {option.default}."
        helps[option.name] = f"{text} {default}".strip()
    return helps


def _folded(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


def names() -> tuple[str, ...]:
    """All registered schedule names, in alphabetical order."""
    return tuple(sorted(_KINDS))


def describe(name: str) -> ScheduleKind:
    """What is known of the schedule called `name` (or its PyTorch class name).

    Raises
    ------
    InputError
        If there is no such schedule.
    """
    found = _ALIASES.get(_folded(name))
    if found is None:
        raise unknown_name("schedule", name, _KINDS)
    return _KINDS[found]


def build(
    name: str,
    ranks: int,
    microbatches: int,
    virtual: int | None = None,
    *,
    strict: str | None = None,
    **options: Any,
) -> Schedule:
    """The schedule called `name` for p ranks, m micro-batches and v chunks per rank.

    Parameters
    ----------
    name:
        A registered name or a PyTorch class name (`Interleaved1F1B`), case-insensitive.
    ranks, microbatches:
        p >= 1 and m >= 1.
    virtual:
        Chunks per rank; the default is 1, or 2 for schedules that need two.
    strict:
        `"pytorch"` also rejects what PyTorch's class rejects although the schedule itself
        exists there (1F1B with m < p).
    options:
        Options of that schedule, such as `microbatch_group_size` of `interleaved-1f1b`.

    Raises
    ------
    InputError
        If the name or an option is unknown, or a constraint of the schedule is violated.
    """
    kind = describe(name)
    chunks = kind.default_virtual if virtual is None else virtual
    for what, value in (("stages", ranks), ("micro-batches", microbatches), ("chunks", chunks)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{kind.name}: the number of {what} must be at least 1, got {value!r}")
    if ranks * microbatches * chunks > MOST_PASSES:
        raise InputError(
            f"{kind.name}: {ranks} stages x {chunks} chunks x {microbatches} micro-batches are "
            f"more than {MOST_PASSES} passes"
        )
    if strict not in (None, "pytorch"):
        raise unknown_name("strictness", str(strict), ["pytorch"])
    given = {key: value for key, value in options.items() if value is not None}
    check_options(kind, given)
    given = {key: _option(kind, key, value) for key, value in given.items()}
    _check_chunks(kind, chunks)
    if strict == "pytorch":
        _check_pytorch(kind, ranks, microbatches)
    orders = kind.builder(ranks, microbatches, chunks, **given)
    stage_to_rank = kind.placement(ranks, chunks)
    replicas = 2 if kind.placement is opposite else 1
    return Schedule(
        name=kind.name,
        ranks=ranks,
        stages=len(stage_to_rank),
        microbatches=microbatches,
        stage_to_rank=stage_to_rank,
        actions=tuple(tuple(order) for order in orders),
        chain_len=len(stage_to_rank) // replicas,
        flush=kind.flush,
        weight_copies=kind.weight_copies,
    )


def check_options(kind: ScheduleKind, given: Iterable[str]) -> None:
    """Raise `InputError` for an option that the schedule does not take."""
    for key in given:
        if key not in kind.options:
            guess = nearest(key, kind.options)
            hint = f"; did you mean {guess!r}?" if guess else ""
            known = ", ".join(kind.options) or "none"
            raise InputError(f"{kind.name} has no option {key!r}{hint} (its options: {known})")


def _option(kind: ScheduleKind, key: str, value: Any) -> Any:
    """The value of an option, checked against what the schedule's function says that it takes.

    A mapping is made the dataclass that the option wants.
    """
    hint = typing.get_type_hints(kind.builder).get(key, Any)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    where = f"{kind.name}: option {key}"
    for choice in choices:
        if dataclasses.is_dataclass(choice) and isinstance(value, Mapping):
            known = [field.name for field in dataclasses.fields(choice)]
            for name in value:
                if name not in known:
                    raise unknown_name("key", str(name), known, place=where)
            return typing.cast(Any, choice)(**value)
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and (float in choices or (int in choices and isinstance(value, Integral))):
        return value
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError:
        words = " or ".join(_WORDS.get(choice, "a list") for choice in choices if choice in _WORDS
                            or typing.get_origin(choice) is not None)  # fmt: skip
        raise InputError(f"expected {words or 'a mapping'}, got {value!r}", place=where) from None


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _check_chunks(kind: ScheduleKind, virtual: int) -> None:
    if kind.chunks == "1" and virtual != 1:
        raise InputError(
            f"{kind.name} has one chunk per rank, got {virtual}; "
            "interleaved-1f1b, looped-bfs and interleaved-zb take more"
        )
    if kind.chunks == "2" and virtual != 2:
        raise InputError(f"{kind.name} requires exactly 2 stages per rank, but got {virtual}")
    if kind.chunks == "even" and virtual % 2:
        raise InputError(f"{kind.name} requires an even number of chunks per rank, got {virtual}")


def _check_pytorch(kind: ScheduleKind, ranks: int, microbatches: int) -> None:
    if kind.pytorch is None:
        raise InputError(f"PyTorch has no schedule {kind.name}")
    if kind.pytorch == "1F1B" and microbatches < ranks:
        raise InputError(
            f"1f1b: number of micro-batches ({microbatches}) must be greater than or equal to "
            f"the number of stages ({ranks}) in PyTorch"
        )
    if kind.pytorch == "InterleavedZeroBubble":
        check_rounds(kind.name, ranks, microbatches)


def check_rounds(name: str, ranks: int, microbatches: int) -> int:
    """Micro-batches per round of PyTorch's interleaved schedules (its "flexible" rule).

    Rounds are max(1, m // p); m must be a multiple of them.
    Source: torch.distributed.pipelining, `ScheduleInterleaved1F1B`.

    Raises
    ------
    InputError
        If m is not a multiple of the number of rounds; names the nearest valid m.
    """
    rounds = max(1, microbatches // ranks)
    if microbatches % rounds:
        valid = [
            count
            for distance in range(1, 2 * ranks + 2)
            for count in (microbatches - distance, microbatches + distance)
            if count > 0 and count % max(1, count // ranks) == 0
        ]
        raise InputError(
            f"{name} requires the number of micro-batches to be a multiple of the number of "
            f"rounds ({rounds} = {microbatches} // {ranks}), but got {microbatches}; "
            f"the nearest valid number is {valid[0]}"
        )
    return microbatches // rounds
