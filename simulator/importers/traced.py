"""Models traced from a framework: layers of operations, in a form that an experiment can name.

A traced model is data: the operations of every layer, forward and backward, as some framework runs
them for a given batch. In an experiment it is a mapping with `family: traced` (in place of
dimensions), usually in a file of its own: `model: mymodel.yaml`. Operations scale with the
micro-batch where the trace knows how (`per_sample`); there is no tensor, context or expert
parallelism of a traced model, since nothing says how its tensors would be split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.errors import InputError, raise_all, unknown_name
from simulator.model.operations import Attention, Gemm, MemoryBound, Phase

if TYPE_CHECKING:
    from simulator.model.context import LayerContext
    from simulator.model.layers import LayerOperations
    from simulator.model.spec import ModelSpec, ParameterTensor

TracedKind = Gemm | Attention | MemoryBound
_TYPES: dict[str, type[TracedKind]] = {
    "gemm": Gemm, "attention": Attention, "memory_bound": MemoryBound,
}  # fmt: skip
_NAME_OF: dict[type[TracedKind], str] = {kind: name for name, kind in _TYPES.items()}
#: What the experiment decides, not the trace.
_DECIDED = ("precision", "output_bytes", "accumulate")
_COUNTS = ("m", "n", "k", "batch", "heads", "kv_heads", "q_len", "kv_len", "qk_dim", "v_dim")
_SIZES = ("bytes_read", "bytes_written", "flops")
ROLES = ("embedding", "block", "head")
_OP_CLASSES = (
    "norm", "elementwise", "activation", "softmax", "embedding", "cross_entropy", "permute",
    "router", "cast", "optimizer", "copy",
)  # fmt: skip
_MAX_LAYERS = 100_000
_MAX_COUNT = 1 << 50


@dataclass(frozen=True, slots=True)
class TracedOperation:
    """One operation at the traced batch, and what each further sample adds to its sizes."""

    operation: TracedKind
    per_sample: tuple[tuple[str, float], ...] = ()
    """Fields that grow with the batch, and by how much per sample."""

    def at(self, samples: float) -> TracedKind:
        """The operation with `samples` more samples than were traced."""
        if not samples or not self.per_sample:
            return self.operation
        changes: dict[str, Any] = {}
        for name, slope in self.per_sample:
            value = getattr(self.operation, name) + slope * samples
            changes[name] = max(1, round(value)) if name in _COUNTS else max(0.0, value)
        return dataclasses.replace(self.operation, **changes)


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """One layer; bytes are those of the traced element size."""

    name: str
    role: str
    """`embedding` (everything before the first block), `block`, or `head` (after the last)."""
    parameters: int
    output_bytes: float
    """Activation that the next layer reads, per traced batch."""
    stored_bytes: float
    """What the forward keeps for the backward, per traced batch."""
    forward: tuple[TracedOperation, ...]
    backward: tuple[TracedOperation, ...]
    forward_flops: float = 0.0
    """As the framework's own counter counts, per traced batch."""
    backward_flops: float = 0.0


@dataclass(frozen=True, eq=False)
class TracedModel:
    """A model as layers of operations (see the module's text).

    `batch` samples of `sequence` tokens were traced, with floats of `element_bytes`. A model that
    is not `scalable` runs with exactly that micro-batch.
    """

    name: str
    batch: int
    sequence: int
    element_bytes: float
    layers: tuple[TracedLayer, ...]
    scalable: bool = True
    source: str = ""

    @property
    def blocks(self) -> tuple[TracedLayer, ...]:
        """The layers that pipeline stages divide."""
        return tuple(layer for layer in self.layers if layer.role == "block")

    @property
    def parameters(self) -> int:
        """Parameters of all layers; a shared one counts where it is used first."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward of the traced batch, as the framework's counter counts."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def backward_flops(self) -> float:
        return sum(layer.backward_flops for layer in self.layers)

    @property
    def flops(self) -> float:
        """FLOPs of forward and backward of the traced batch."""
        return self.forward_flops + self.backward_flops

    # -- what the model floor asks -------------------------------------------------------------

    def layer(self, layer: object) -> TracedLayer | None:
        """The layer that a `LayerId` (or the `Block` of an index) names."""
        index = getattr(layer, "index", layer)
        if isinstance(index, int):
            return self.blocks[index]
        return next((found for found in self.layers if found.role == index), None)

    def tensors(self, layer: object) -> tuple[ParameterTensor, ...]:
        """The layer's parameters as one tensor that is replicated over tensor parallelism."""
        from simulator.model.spec import ParameterTensor

        found = self.layer(layer)
        if found is None or not found.parameters:
            return ()
        return (ParameterTensor("traced", found.parameters, "replicated"),)

    def operations(self, layer: object, ctx: LayerContext) -> LayerOperations:
        """Operations of one layer and micro-batch in the experiment's precision."""
        from simulator.model.layers import LayerOperations

        found = self.layer(layer)
        if found is None:
            return LayerOperations((), ())
        forward = self._placed(found.forward, ctx)
        backward = self._placed(found.backward, ctx)
        if ctx.recompute == "full" and found.role == "block":
            again = tuple(dataclasses.replace(op, name=f"recompute.{op.name}") for op in forward)
            backward = (*again, *backward)
        return LayerOperations(forward, backward)

    def _placed(
        self, operations: Sequence[TracedOperation], ctx: LayerContext
    ) -> tuple[TracedKind, ...]:
        samples = ctx.micro_batch - self.batch
        scale = ctx.element / self.element_bytes
        placed: list[TracedKind] = []
        for item in operations:
            op = item.at(samples)
            if isinstance(op, Gemm):
                op = dataclasses.replace(op, precision=ctx.precision, output_bytes=ctx.element)
            elif isinstance(op, Attention):
                op = dataclasses.replace(op, precision=ctx.wide)
            else:
                op = dataclasses.replace(
                    op, bytes_read=op.bytes_read * scale, bytes_written=op.bytes_written * scale
                )
            placed.append(op)
        return tuple(placed)

    def stored_bytes(self, layer: object, ctx: LayerContext) -> float:
        """Bytes that one micro-batch keeps for the backward: all, or the input of a recomputed
        layer (estimated as its output, which has the size of the next layer's input)."""
        found = self.layer(layer)
        if found is None:
            return 0.0
        recomputed = ctx.recompute == "full" and found.role == "block"
        return self._sized(found.output_bytes if recomputed else found.stored_bytes, ctx)

    def transient_bytes(self, layer: object, ctx: LayerContext) -> float:
        """Working set of a layer beyond what it stores: the gradients of its input and output,
        and what recomputation brings back."""
        found = self.layer(layer)
        if found is None:
            return 0.0
        recomputed = found.stored_bytes if ctx.recompute == "full" else 0.0
        return self._sized(2.0 * found.output_bytes + recomputed, ctx)

    def _sized(self, traced_bytes: float, ctx: LayerContext) -> float:
        return traced_bytes / self.batch * ctx.micro_batch * ctx.element / self.element_bytes

    def flops_per_sample(self, *, backward: bool) -> float:
        """FLOPs of one sample's forward, or of its forward and backward."""
        return (self.flops if backward else self.forward_flops) / self.batch

    def check_context(self, ctx: LayerContext) -> Iterable[str]:
        """What an experiment may not ask of this model, one sentence each."""
        for key in ("tensor", "context", "expert", "expert_tensor"):
            if getattr(ctx, key) != 1:
                yield (
                    f"{key} = {getattr(ctx, key)}: the traced model {self.name!r} runs with data "
                    "and pipeline parallelism only; expected 1"
                )
        if ctx.seq != self.sequence:
            yield (
                f"sequence_length = {ctx.seq}: the model was traced with {self.sequence}; "
                "leave it out or trace again"
            )
        if not self.scalable and ctx.micro_batch != self.batch:
            yield (
                f"micro_batch_size = {ctx.micro_batch}: the model was traced with {self.batch} and "
                "its operations do not scale with the batch; trace again"
            )

    # -- as data -------------------------------------------------------------------------------

    def to_mapping(self) -> dict[str, Any]:
        """The `model:` mapping of an experiment; `traced_from_mapping` inverts it."""
        layers: list[dict[str, Any]] = []
        last: TracedLayer | None = None
        for layer in self.layers:
            alike = last is not None and dataclasses.replace(layer, name="") == dataclasses.replace(
                last, name=""
            )
            if alike and layer.role == "block":
                layers[-1]["repeat"] = layers[-1].get("repeat", 1) + 1
                continue
            last = layer
            layers.append(_layer_mapping(layer))
        mapping: dict[str, Any] = {
            "family": "traced",
            "name": self.name,
            "batch": self.batch,
            "sequence": self.sequence,
            "element_bytes": self.element_bytes,
        }
        if not self.scalable:
            mapping["scalable"] = False
        if self.source:
            mapping["source"] = self.source
        mapping["layers"] = layers
        return mapping

    def to_spec(self) -> ModelSpec:
        """The model as the simulator's floors know models."""
        from simulator.model.spec import ModelSpec

        per_token = max(
            (layer.output_bytes for layer in self.layers), default=0.0
        ) / (self.element_bytes * self.batch * self.sequence)  # fmt: skip
        return ModelSpec(
            name=self.name,
            family="traced",
            layers=len(self.blocks),
            hidden=max(1, math.ceil(per_token)),
            heads=1,
            kv_heads=1,
            head_dim=1,
            ffn=0,
            vocab=0,
            max_seq=self.sequence,
            source=self.source,
            traced=self,
        )


def _layer_mapping(layer: TracedLayer) -> dict[str, Any]:
    mapping: dict[str, Any] = {"name": layer.name, "role": layer.role}
    for key in ("parameters", "output_bytes", "stored_bytes", "forward_flops", "backward_flops"):
        mapping[key] = getattr(layer, key)
    for key in ("forward", "backward"):
        mapping[key] = [_operation_mapping(item) for item in getattr(layer, key)]
    return mapping


def _operation_mapping(item: TracedOperation) -> dict[str, Any]:
    op = item.operation
    mapping: dict[str, Any] = {"type": _NAME_OF[type(op)]}
    for entry in dataclasses.fields(op):
        value = getattr(op, entry.name)
        if entry.name in _DECIDED or value == entry.default:
            continue
        mapping[entry.name] = str(value) if entry.name == "phase" else value
    if item.per_sample:
        mapping["per_sample"] = dict(item.per_sample)
    return mapping


# ---------------------------------------------------------------------------------- reading


def traced_from_mapping(mapping: Mapping[str, Any], *, place: str = "model") -> TracedModel:
    """The traced model that a mapping with `family: traced` describes.

    Raises
    ------
    InputError
        Every unknown key, missing or impossible value at once.
    """
    reader = _Reader(place)
    model = reader.model(mapping)
    raise_all(reader.errors[:20])
    assert model is not None
    return model


def traced_layers(
    mapping: Mapping[str, Any], ctx: LayerContext, *, place: str = "model"
) -> list[tuple[LayerOperations, int]]:
    """Operations and parameters of every layer of a traced model's mapping, in order.

    Raises
    ------
    InputError
        If the mapping is wrong, or the context asks for what a traced model cannot do.
    """
    model = traced_from_mapping(mapping, place=place)
    raise_all([InputError(problem, place=place) for problem in model.check_context(ctx)])
    blocks = iter(range(len(model.blocks)))
    result = []
    for layer in model.layers:
        key: object = next(blocks) if layer.role == "block" else layer.role
        result.append((model.operations(key, ctx), layer.parameters))
    return result


class _Reader:
    def __init__(self, place: str) -> None:
        self.place = place
        self.errors: list[InputError] = []

    def fail(self, where: str, problem: str) -> None:
        self.errors.append(
            InputError(problem, place=f"{self.place}.{where}" if where else self.place)
        )

    def keys(self, mapping: Any, known: Sequence[str], where: str) -> dict[str, Any]:
        if not isinstance(mapping, Mapping):
            self.fail(where, f"expected a mapping, got {_short(mapping)}")
            return {}
        for key in mapping:
            if key not in known:
                error = unknown_name("key", str(key), known)
                self.fail(where, error.problem)
        return {key: mapping[key] for key in known if key in mapping}

    def number(self, value: Any, where: str, *, whole: bool = False, least: float = 0.0) -> float:
        fine = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= 1e30
            and (not whole or (value == int(value) and value <= _MAX_COUNT))
        )
        if not fine:
            kind = "a whole number" if whole else "a number"
            self.fail(where, f"expected {kind} of at least {least:g}, got {_short(value)}")
            return max(1.0, least)
        return float(value)

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            self.fail(where, f"expected text, got {_short(value)}")
            return ""
        return value

    def model(self, mapping: Any) -> TracedModel | None:
        known = ("family", "name", "batch", "sequence", "element_bytes", "scalable", "source",
                 "layers")  # fmt: skip
        values = self.keys(mapping, known, "")
        batch = int(self.number(values.get("batch", 1), "batch", whole=True, least=1))
        sequence = int(self.number(values.get("sequence", 1), "sequence", whole=True, least=1))
        element = self.number(values.get("element_bytes", 4), "element_bytes", least=0.125)
        scalable = values.get("scalable", True)
        if not isinstance(scalable, bool):
            self.fail("scalable", f"expected true or false, got {_short(scalable)}")
        given = values.get("layers")
        if not isinstance(given, list) or not given:
            self.fail("layers", f"expected a list of layers, got {_short(given)}")
            return None
        layers: list[TracedLayer] = []
        for index, item in enumerate(given):
            layers.extend(self.layer(item, f"layers[{index}]"))
            if len(layers) > _MAX_LAYERS:
                self.fail("layers", f"more than {_MAX_LAYERS} layers")
                return None
            if len(self.errors) > 20:
                return None
        roles = [layer.role for layer in layers]
        order = sorted(roles, key=ROLES.index)
        if roles != order or roles.count("embedding") > 1 or roles.count("head") > 1:
            self.fail(
                "layers", "expected at most one embedding, then blocks, then at most one head"
            )
        if "block" not in roles:
            self.fail("layers", "expected at least one layer with role block")
        if self.errors:
            return None
        return TracedModel(
            name=self.text(values.get("name", "traced"), "name"),
            batch=batch,
            sequence=sequence,
            element_bytes=element,
            layers=tuple(layers),
            scalable=bool(scalable),
            source=self.text(values.get("source", ""), "source"),
        )

    def layer(self, item: Any, where: str) -> list[TracedLayer]:
        sizes = ("output_bytes", "stored_bytes", "forward_flops", "backward_flops")
        known = ("name", "role", "repeat", "parameters", *sizes, "forward", "backward")
        values = self.keys(item, known, where)
        role = values.get("role", "block")
        if role not in ROLES:
            self.fail(f"{where}.role", unknown_name("role", str(role), ROLES).problem)
            role = "block"
        repeat = int(self.number(values.get("repeat", 1), f"{where}.repeat", whole=True, least=1))
        if repeat > _MAX_LAYERS or (repeat > 1 and role != "block"):
            self.fail(f"{where}.repeat", f"a {role} cannot be repeated {repeat} times")
            repeat = 1
        numbers = {key: self.number(values.get(key, 0.0), f"{where}.{key}") for key in sizes}
        lists: dict[str, tuple[TracedOperation, ...]] = {}
        for key in ("forward", "backward"):
            operations = values.get(key, [])
            if not isinstance(operations, list):
                self.fail(
                    f"{where}.{key}", f"expected a list of operations, got {_short(operations)}"
                )
                operations = []
            read = [
                self.operation(op, f"{where}.{key}[{i}]", key) for i, op in enumerate(operations)
            ]
            lists[key] = tuple(op for op in read if op is not None)
        count = self.number(values.get("parameters", 0), f"{where}.parameters", whole=True)
        layer = TracedLayer(
            name=self.text(values.get("name", ""), f"{where}.name"),
            role=str(role),
            parameters=int(count),
            output_bytes=numbers["output_bytes"],
            stored_bytes=numbers["stored_bytes"],
            forward=lists["forward"],
            backward=lists["backward"],
            forward_flops=numbers["forward_flops"],
            backward_flops=numbers["backward_flops"],
        )
        if repeat == 1:
            return [layer]
        return [layer] * repeat

    def operation(self, item: Any, where: str, direction: str) -> TracedOperation | None:
        if not isinstance(item, Mapping):
            self.fail(where, f"expected a mapping, got {_short(item)}")
            return None
        kind = item.get("type")
        if not isinstance(kind, str) or kind not in _TYPES:
            self.fail(f"{where}.type", unknown_name("operation type", str(kind), _TYPES).problem)
            return None
        cls = _TYPES[kind]
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        known = ("type", "per_sample", *(name for name in fields if name not in _DECIDED))
        before = len(self.errors)
        values = self.keys(item, known, where)
        arguments: dict[str, Any] = {}
        for name, entry in fields.items():
            if name in _DECIDED:
                continue
            if name not in values:
                if entry.default is dataclasses.MISSING:
                    self.fail(f"{where}.{name}", "missing; it must be given")
                elif name == "phase" and direction == "backward":
                    arguments[name] = Phase.INPUT_GRADIENT
                continue
            arguments[name] = self.field(name, values[name], f"{where}.{name}")
        if len(self.errors) > before:
            return None
        slopes: list[tuple[str, float]] = []
        scaled = self.keys(values.get("per_sample", {}), (*_COUNTS, *_SIZES), f"{where}.per_sample")
        for name, slope in scaled.items():
            if name not in fields:
                self.fail(f"{where}.per_sample", f"a {kind} has no {name}")
            slopes.append((name, self.number(slope, f"{where}.per_sample.{name}", least=-1e30)))
        if len(self.errors) > before:
            return None
        return TracedOperation(cls(**arguments), tuple(slopes))

    def field(self, name: str, value: Any, where: str) -> Any:
        if name in _COUNTS:
            return int(self.number(value, where, whole=True, least=1))
        if name in _SIZES:
            return self.number(value, where)
        if name == "kernels":
            return int(self.number(value, where, whole=True))
        if name == "causal":
            if not isinstance(value, bool):
                self.fail(where, f"expected true or false, got {_short(value)}")
            return value
        if name == "window":
            return None if value is None else int(self.number(value, where, whole=True, least=1))
        if name == "phase":
            phases = ("F", "I", "W")
            if value not in phases:
                self.fail(where, unknown_name("phase", str(value), phases).problem)
                return Phase.FORWARD
            return Phase(value)
        if name == "op_class" and value not in _OP_CLASSES:
            self.fail(where, unknown_name("op_class", str(value), _OP_CLASSES).problem)
        return self.text(value, where)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fit(
    once: Sequence[TracedLayer], twice: Sequence[TracedLayer], batch: int
) -> tuple[TracedLayer, ...] | None:
    """Layers traced at `batch` with what each sample adds, from a second trace at 2 `batch`.

    None if the two traces do not consist of the same operations.
    """
    if len(once) != len(twice):
        return None
    fitted: list[TracedLayer] = []
    for a, b in zip(once, twice, strict=True):
        if (a.name, a.role, a.parameters) != (b.name, b.role, b.parameters):
            return None
        lists: dict[str, tuple[TracedOperation, ...]] = {}
        for key in ("forward", "backward"):
            first, second = getattr(a, key), getattr(b, key)
            if len(first) != len(second):
                return None
            scaled = [
                _scaled(x.operation, y.operation, batch) for x, y in zip(first, second, strict=True)
            ]
            if any(item is None for item in scaled):
                return None
            lists[key] = tuple(item for item in scaled if item is not None)
        fitted.append(dataclasses.replace(a, forward=lists["forward"], backward=lists["backward"]))
    return tuple(fitted)


def fit_doubled(
    once: tuple[TracedLayer, ...], twice: Callable[[], Sequence[TracedLayer]], batch: int
) -> tuple[tuple[TracedLayer, ...], bool]:
    """`fit` with what `twice` traces at 2 `batch`, and True; `once` and False if that fails.

    A function that takes the given batch only is a model of that batch.
    """
    try:
        fitted = fit(once, twice(), batch)
    except InputError:
        fitted = None
    return (once, False) if fitted is None else (fitted, True)


def _scaled(a: TracedKind, b: TracedKind, batch: int) -> TracedOperation | None:
    if type(a) is not type(b):
        return None
    slopes: list[tuple[str, float]] = []
    for entry in dataclasses.fields(a):
        x, y = getattr(a, entry.name), getattr(b, entry.name)
        if entry.name in (*_COUNTS, *_SIZES):
            if x != y:
                slopes.append((entry.name, (y - x) / batch))
        elif x != y:
            return None
    return TracedOperation(a, tuple(slopes))
