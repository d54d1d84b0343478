"""Models from a JAX function: its jaxpr, forward and backward, as layers of operations.

`jax.vjp` splits the function into a forward that also returns what it keeps, and a backward; both
are traced with shapes only. Matrix products and convolutions become products of the cost model.
What lies between them is fused as XLA fuses it: a run of elementwise operations and reductions
reads its inputs and writes its results once.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from simulator.errors import InputError
from simulator.importers.files import optional
from simulator.importers.traced import (
    TracedKind,
    TracedLayer,
    TracedModel,
    TracedOperation,
    fit_doubled,
)
from simulator.model.operations import Gemm, MemoryBound, Phase

#: Layer keys: blocks are ("name", text) or ("scan", number, iteration); None: in no block.
_Key = tuple[Any, ...] | None

#: Primitives whose parameter of this name is the jaxpr to look into.
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
#: Primitives that end a fusion: XLA runs them as kernels of their own.
_ALONE = {
    "gather": "embedding", "scatter": "embedding", "scatter-add": "embedding",
    "scatter_add": "embedding", "dynamic_slice": "copy", "dynamic_update_slice": "copy",
    "sort": "permute", "top_k": "permute", "concatenate": "copy", "cumsum": "elementwise",
    "random_bits": "elementwise", "threefry2x32": "elementwise", "fft": "elementwise",
}  # fmt: skip
_MAX_ITERATIONS = 4096
_MAX_RECORDS = 2_000_000


def model_from_jax(
    function: Callable[..., Any],
    params: Any,
    *inputs: Any,
    name: str | None = None,
    blocks: Sequence[str] = (),
    sequence_length: int | None = None,
) -> TracedModel:
    """Trace `function(params, *inputs)` and its gradient in `params`.

    Parameters
    ----------
    params:
        Pytree of arrays or `jax.ShapeDtypeStruct`s: the parameters.
    inputs:
        Arrays or `jax.ShapeDtypeStruct`s; dimension 0 of each is the batch.
    blocks:
        Patterns of the named scopes (`jax.named_scope`, Flax modules) that are layers; when left
        out, scopes that end in a number, else the iterations of `jax.lax.scan`, else the whole
        function is one layer.
    sequence_length:
        Tokens per sample; when left out, dimension 1 of a first input of integers, else 1.

    Returns
    -------
    TracedModel
        `to_mapping()` of it is an experiment's `model`.

    Raises
    ------
    InputError
        If JAX is not installed or the function cannot be traced.
    """
    jax = optional("jax", "jax", "tracing a JAX function")
    shapes = [jax.ShapeDtypeStruct(_shape(x), x.dtype) for x in map(_as_array(jax), inputs)]
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(_shape(x), x.dtype), params)
    if not shapes or not shapes[0].shape or shapes[0].shape[0] < 1:
        raise InputError("expected inputs with a batch dimension", place="inputs")
    batch = int(shapes[0].shape[0])
    first = shapes[0]
    integer = first.dtype.kind in "iu"
    sequence = sequence_length or (
        int(first.shape[1]) if integer and len(first.shape) == 2 and first.shape[1] else 1
    )
    title = name or getattr(function, "__name__", "function").replace("<lambda>", "function")
    once = _traced(jax, function, tree, shapes, blocks, title)
    layers, scalable = once, False
    if all(s.shape and s.shape[0] == batch for s in shapes):
        doubled = [jax.ShapeDtypeStruct((2 * batch, *s.shape[1:]), s.dtype) for s in shapes]
        layers, scalable = fit_doubled(
            once, lambda: _traced(jax, function, tree, doubled, blocks, title), batch
        )
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype.kind in "fV"]
    return TracedModel(
        name=title,
        batch=batch,
        sequence=sequence,
        element_bytes=float(leaves[0].dtype.itemsize if leaves else 4),
        layers=layers,
        scalable=scalable,
        source=f"JAX {jax.__version__}, jaxpr of the function and its gradient",
    )


def _as_array(jax: Any) -> Callable[[Any], Any]:
    import numpy as np

    return lambda x: x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in x.shape)


def _traced(
    jax: Any, function: Callable[..., Any], params: Any, inputs: Any, blocks: Any, title: str
) -> tuple[TracedLayer, ...]:
    def forward(p: Any, *x: Any) -> Any:
        return jax.vjp(lambda q: function(q, *x), p)

    try:
        ahead, (output, pullback) = jax.make_jaxpr(forward, return_shape=True)(params, *inputs)
        back = jax.make_jaxpr(lambda pull, cotangent: pull(cotangent))(pullback, output)
    except Exception as error:  # whatever the user's function raises
        text = str(error).strip().splitlines()
        raise InputError(
            f"cannot be traced: {type(error).__name__}: {text[0] if text else ''}", place=title
        ) from None
    return _Tracer(jax, ahead, back, params, output, blocks).layers()


@dataclass(slots=True)
class _Value:
    """A tensor of the jaxpr."""

    bytes: float
    elements: int


@dataclass(slots=True)
class _Record:
    """One equation: a product, a kernel of its own, or a part of a fusion."""

    kind: str
    """`gemm`, a class of `_ALONE`, or `fused`."""
    name: str
    key: _Key
    gemm: Gemm | None
    inputs: list[int]
    outputs: list[int]


@dataclass(slots=True)
class _Walk:
    """One jaxpr, flattened: records in order, tensors by number."""

    values: list[_Value] = field(default_factory=list)
    records: list[_Record] = field(default_factory=list)
    scans: list[int] = field(default_factory=list)
    """Length of every scan, in order."""
    stacked: dict[int, int] = field(default_factory=dict)
    """Value that a scan collects over its iterations -> number of the scan."""

    def value(self, aval: Any) -> int:
        shape = getattr(aval, "shape", ())
        elements = math.prod(int(d) for d in shape)
        dtype = getattr(aval, "dtype", None)
        self.values.append(_Value(float(elements * getattr(dtype, "itemsize", 4)), elements))
        return len(self.values) - 1


class _Tracer:
    def __init__(
        self, jax: Any, ahead: Any, back: Any, params: Any, output: Any, blocks: Sequence[str]
    ) -> None:
        self.patterns = tuple(blocks)
        leaves = jax.tree.leaves(params)
        self.sizes = [math.prod(leaf.shape) for leaf in leaves]
        self.forward = _Walk()
        arguments = [self.forward.value(v.aval) for v in ahead.jaxpr.invars]
        results = self._run(self.forward, ahead, arguments, "", None, False)
        self.param_values = arguments[: len(leaves)]
        outputs = len(jax.tree.leaves(output))
        given = set(arguments)
        self.kept = list(dict.fromkeys(v for v in results[outputs:] if v not in given))
        self.output_bytes = sum(self.forward.values[v].bytes for v in results[:outputs])
        self.backward = _Walk()
        cotangents = [self.backward.value(v.aval) for v in back.jaxpr.invars]
        self.gradients = set(self._run(self.backward, back, cotangents, "", None, True))

    # -- flattening ----------------------------------------------------------------------------

    def _run(
        self, walk: _Walk, closed: Any, arguments: list[int], scope: str, key: _Key, backward: bool
    ) -> list[int]:
        """Records of a (closed) jaxpr called with `arguments`; returns its results."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable in jaxpr.constvars:
            known[variable] = walk.value(variable.aval)

        def read(atom: Any) -> int:
            if hasattr(atom, "val"):  # a literal
                return walk.value(None)
            return known[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            stack = str(equation.source_info.name_stack)
            path = f"{scope}/{stack}" if scope and stack else scope or stack
            outputs = self._equation(walk, equation, inputs, path, key, backward)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self, walk: _Walk, equation: Any, inputs: list[int], path: str, key: _Key, backward: bool
    ) -> list[int]:
        name, parameters = equation.primitive.name, equation.params
        if name == "scan":
            return self._scan(walk, equation, inputs, path, key, backward)
        if name == "while":
            count = parameters["cond_nconsts"]
            return self._run(walk, parameters["body_jaxpr"], inputs[count:], path, key, backward)
        if name == "cond":
            # the longest branch stands for all
            branch = max(parameters["branches"], key=lambda b: len(b.jaxpr.eqns))
            return self._run(walk, branch, inputs[1:], path, key, backward)
        inner = next((parameters[p] for p in _INNER if p in parameters), None)
        if inner is not None and hasattr(getattr(inner, "jaxpr", inner), "eqns"):
            wanted = len(getattr(inner, "jaxpr", inner).invars)
            return self._run(walk, inner, inputs[:wanted], path, key, backward)
        outputs = [walk.value(v.aval) for v in equation.outvars]
        if len(walk.records) > _MAX_RECORDS:
            raise InputError(f"more than {_MAX_RECORDS} operations")
        where = key if key is not None else self._block(path)
        gemm = None
        kind = _ALONE.get(name, "fused")
        if name == "dot_general":
            kind, gemm = "gemm", _product(equation)
        elif name == "conv_general_dilated":
            kind, gemm = "gemm", _convolution(equation)
        walk.records.append(_Record(kind, name, where, gemm, inputs, outputs))
        return outputs

    def _scan(
        self, walk: _Walk, equation: Any, inputs: list[int], path: str, key: _Key, backward: bool
    ) -> list[int]:
        parameters = equation.params
        length = int(parameters["length"])
        if length > _MAX_ITERATIONS:
            raise InputError(f"a scan of {length} iterations (at most {_MAX_ITERATIONS})")
        consts, carries = parameters["num_consts"], parameters["num_carry"]
        fixed, carry = inputs[:consts], inputs[consts : consts + carries]
        body = parameters["jaxpr"]
        slices = [v.aval for v in body.jaxpr.invars[consts + carries :]]
        number = len(walk.scans)
        walk.scans.append(length)
        for iteration in range(length):
            index = length - 1 - iteration if parameters["reverse"] else iteration
            inner = key
            if key is None and length > 1:
                inner = self._block(path) or ("scan", number, index)
            parts = [walk.value(aval) for aval in slices]
            for whole, part in zip(inputs[consts + carries :], parts, strict=True):
                self._slice_of(walk, whole, part, inner)
            results = self._run(walk, body, [*fixed, *carry, *parts], path, inner, backward)
            carry = results[:carries]
        stacked = [walk.value(v.aval) for v in equation.outvars[carries:]]
        walk.stacked.update(dict.fromkeys(stacked, number))
        return [*carry, *stacked]

    @staticmethod
    def _slice_of(walk: _Walk, whole: int, part: int, key: _Key) -> None:
        """A scanned input is read where its slice is: remember that without moving anything."""
        walk.records.append(_Record("slice", "slice", key, None, [whole], [part]))

    def _block(self, path: str) -> _Key:
        """The block that a name stack such as `jvp(net)/layer_3/mul` lies in."""
        parts = [p for p in re.split(r"[/()]", path) if p and p not in _TRANSFORMS]
        for position, part in enumerate(parts):
            here = "/".join(parts[: position + 1])
            if self.patterns:
                if any(
                    fnmatch.fnmatchcase(text, p) for p in self.patterns for text in (here, part)
                ):
                    return ("name", here)
            elif re.search(r"\d$", part):
                return ("name", here)
        return None

    # -- layers --------------------------------------------------------------------------------

    def layers(self) -> tuple[TracedLayer, ...]:
        keys: list[_Key] = []
        named = any(r.key and r.key[0] == "name" for r in self.forward.records)
        for record in self.forward.records:
            if record.key is not None and record.key not in keys:
                if named and record.key[0] != "name":
                    continue  # a loop beside named blocks is part of what is around it
                keys.append(record.key)
        index = {key: i for i, key in enumerate(keys)}
        back_to_front = self.forward.scans[::-1]
        number = {
            n: len(self.forward.scans) - 1 - back_to_front.index(length)
            for n, length in enumerate(self.backward.scans)
            if length in back_to_front
        }
        ahead = self._ahead(index)
        renamed = [
            dataclasses.replace(r, key=("scan", number.get(r.key[1], -1), r.key[2]))
            if r.key is not None and r.key[0] == "scan"
            else r
            for r in self.backward.records
        ]
        back_layers = self._behind(renamed, index)
        last = len(keys) - 1
        weights = self._weight_gradients()
        parameters = self._parameters(ahead)
        made_in = {
            v: i for r, i in zip(self.forward.records, ahead, strict=True) for v in r.outputs
        }
        stored: dict[int, float] = {}
        for value in self.kept:
            number_of = self.forward.stacked.get(value)
            among = [i for key, i in index.items() if key and key[:2] == ("scan", number_of)]
            among = among or [made_in.get(value, last if keys else -1)]
            for at in among:
                share = self.forward.values[value].bytes / len(among)
                stored[at] = stored.get(at, 0.0) + share
        outputs = self._outputs(ahead)
        layers: list[TracedLayer] = []
        for i in range(-1, len(keys) + 1):
            role = "embedding" if i < 0 else ("head" if i == len(keys) else "block")
            mine = [r for r, at in zip(self.forward.records, ahead, strict=True) if at == i]
            theirs = [
                (r, n in weights)
                for n, (r, at) in enumerate(zip(self.backward.records, back_layers, strict=True))
                if at == i
            ]
            if role != "block" and not mine and not theirs and not parameters.get(i):
                continue
            forward = _fused(mine, [False] * len(mine), self.forward, set(self.kept), False)
            backward = _fused(
                [r for r, _ in theirs], [w for _, w in theirs], self.backward, self.gradients, True
            )
            key = keys[i] if role == "block" else None
            layers.append(
                TracedLayer(
                    name=role if key is None else "/".join(str(part) for part in key[1:]),
                    role=role,
                    parameters=parameters.get(i, 0),
                    output_bytes=outputs.get(i, self.output_bytes),
                    stored_bytes=stored.get(i, 0.0),
                    forward=tuple(TracedOperation(op) for op in forward),
                    backward=tuple(TracedOperation(op) for op in backward),
                    forward_flops=sum(r.gemm.flops for r in mine if r.gemm),
                    backward_flops=sum(r.gemm.flops for r, _ in theirs if r.gemm),
                )
            )
        if not keys:
            return (_as_one(layers, self.output_bytes),)
        return tuple(layers)

    def _ahead(self, index: dict[_Key, int]) -> list[int]:
        """Layer of every forward record: what lies in no block belongs to the one before, to the
        embedding (-1) before the first, or to the head after the last has ended."""
        last = len(index) - 1
        records = self.forward.records
        end = max((n for n, r in enumerate(records) if index.get(r.key) == last), default=-1)
        at = -1
        places: list[int] = []
        for n, record in enumerate(records):
            at = index.get(record.key, at)
            places.append(len(index) if n > end and index else at)
        return places

    @staticmethod
    def _behind(records: Sequence[_Record], index: dict[_Key, int]) -> list[int]:
        """Layer of every backward record: the head's first, then as the blocks come."""
        at = len(index)
        first = min((n for n, r in enumerate(records) if index.get(r.key) == 0), default=0)
        done = max((n for n, r in enumerate(records) if index.get(r.key) == 0), default=first)
        places: list[int] = []
        for n, record in enumerate(records):
            at = index.get(record.key, at)
            places.append(-1 if n > done and index else at)
        return places

    def _outputs(self, places: Sequence[int]) -> dict[int, float]:
        """Bytes that every block's results have which later layers read: its largest one."""
        values = self.forward.values
        made: dict[int, int] = {}
        largest: dict[int, float] = {}
        for record, at in zip(self.forward.records, places, strict=True):
            for value in record.inputs:
                source = made.get(value)
                if source is not None and source < at:
                    largest[source] = max(largest.get(source, 0.0), values[value].bytes)
            for value in record.outputs:
                made[value] = at
        return largest

    def _parameters(self, places: Sequence[int]) -> dict[int, int]:
        """Parameters by layer: where they are used first; what a scan slices, spread over it."""
        users: dict[int, list[tuple[int, bool]]] = {value: [] for value in self.param_values}
        for record, at in zip(self.forward.records, places, strict=True):
            for value in record.inputs:
                if value in users:
                    users[value].append((at, record.kind == "slice"))
        counts: dict[int, int] = {}
        for value, size in zip(self.param_values, self.sizes, strict=True):
            used = users[value]
            if used and all(sliced for _, sliced in used):
                share = size // len(used)
                for at, _ in used:
                    counts[at] = counts.get(at, 0) + share
                counts[used[0][0]] += size - share * len(used)
            else:
                at = used[0][0] if used else -1
                counts[at] = counts.get(at, 0) + size
        return counts

    def _weight_gradients(self) -> set[int]:
        """Backward records that make nothing but gradients of parameters (see the PyTorch one)."""
        wanted = set(self.gradients)
        elsewhere: set[int] = set()
        found: set[int] = set()
        records, values = self.backward.records, self.backward.values
        for n in range(len(records) - 1, -1, -1):
            record = records[n]
            made = set(record.outputs)
            if made & elsewhere or not made & wanted:
                elsewhere |= set(record.inputs)
                continue
            found.add(n)
            sizes = {values[v].elements for v in record.outputs}
            for value in record.inputs:
                moves = record.gemm is None and values[value].elements in sizes
                (wanted if moves and value not in elsewhere else elsewhere).add(value)
        return found


_TRANSFORMS = {"jvp", "transpose", "vmap", "remat", "checkpoint", "rematted_computation"}


def _as_one(layers: Sequence[TracedLayer], output_bytes: float) -> TracedLayer:
    """The layer of a function without blocks."""
    return TracedLayer(
        name="model",
        role="block",
        parameters=sum(layer.parameters for layer in layers),
        output_bytes=output_bytes,
        stored_bytes=sum(layer.stored_bytes for layer in layers),
        forward=tuple(op for layer in layers for op in layer.forward),
        backward=tuple(op for layer in reversed(layers) for op in layer.backward),
        forward_flops=sum(layer.forward_flops for layer in layers),
        backward_flops=sum(layer.backward_flops for layer in layers),
    )


def _fused(
    records: Sequence[_Record],
    weight: Sequence[bool],
    walk: _Walk,
    results: set[int],
    backward: bool,
) -> list[TracedKind]:
    """Operations of one layer: products, kernels of their own, and fusions of what is between."""
    uses: dict[int, int] = {}
    for record in walk.records:
        for value in record.inputs:
            uses[value] = uses.get(value, 0) + 1
    operations: list[TracedKind] = []
    run: list[_Record] = []
    run_weight = False

    def phase(is_weight: bool) -> Phase:
        if not backward:
            return Phase.FORWARD
        return Phase.WEIGHT_GRADIENT if is_weight else Phase.INPUT_GRADIENT

    def flush() -> None:
        if run:
            op = _fusion(run, walk, uses, results, phase(run_weight))
            if op is not None:
                operations.append(op)
            run.clear()

    for record, is_weight in zip(records, weight, strict=True):
        if record.kind == "slice":
            continue
        if record.kind == "fused":
            if run and run_weight != is_weight:
                flush()
            run_weight = is_weight
            run.append(record)
            continue
        flush()
        if record.gemm is not None:
            operations.append(dataclasses.replace(record.gemm, phase=phase(is_weight)))
            continue
        written = sum(walk.values[v].bytes for v in record.outputs)
        sizes = [walk.values[v].bytes for v in record.inputs]
        # of what a gather looks up only the rows found are read
        read = written + sum(sizes[1:]) if record.name == "gather" else sum(sizes)
        operations.append(
            MemoryBound(record.name, record.kind, read, written, phase=phase(is_weight))
        )
    flush()
    return operations


def _fusion(
    run: Sequence[_Record], walk: _Walk, uses: dict[int, int], results: set[int], phase: Phase
) -> MemoryBound | None:
    made = {v for record in run for v in record.outputs}
    inside: dict[int, int] = {}
    read: dict[int, None] = {}
    for record in run:
        for value in record.inputs:
            inside[value] = inside.get(value, 0) + 1
            if value not in made:
                read[value] = None
    written = [v for v in made if v in results or uses.get(v, 0) > inside.get(v, 0)]
    size_read = sum(walk.values[v].bytes for v in read)
    size_written = sum(walk.values[v].bytes for v in sorted(written))
    if not size_written and not size_read:
        return None
    names = [record.name for record in run]
    reduces = any(name.startswith("reduce_") for name in names)
    if reduces and "rsqrt" in names:
        kind = "norm"
    elif "exp" in names and reduces:
        kind = "softmax"
    elif {"tanh", "logistic", "erf", "max"} & set(names):
        kind = "activation"
    else:
        kind = "elementwise"
    telling = [n for n in names if n not in ("broadcast_in_dim", "convert_element_type", "reshape")]
    title = "+".join(dict.fromkeys(telling)) or names[0]
    return MemoryBound(title[:60], kind, size_read, size_written, phase=phase)


def _product(equation: Any) -> Gemm:
    a, b = (v.aval.shape for v in equation.invars[:2])
    (ca, cb), (ba, bb) = equation.params["dimension_numbers"]
    batch = math.prod(int(a[d]) for d in ba)
    k = math.prod(int(a[d]) for d in ca)
    m = math.prod(int(size) for d, size in enumerate(a) if d not in ca and d not in ba)
    n = math.prod(int(size) for d, size in enumerate(b) if d not in cb and d not in bb)
    return Gemm("dot_general", max(1, m), max(1, n), max(1, k), max(1, batch))


def _convolution(equation: Any) -> Gemm:
    """Implicit matrix product: rows are output positions, k the filter over the input channels."""
    numbers = equation.params["dimension_numbers"]
    groups = int(equation.params["feature_group_count"]) * int(equation.params["batch_group_count"])
    out = equation.outvars[0].aval.shape
    kernel = equation.invars[1].aval.shape
    features = int(out[numbers.out_spec[1]])
    rows = math.prod(int(size) for size in out) // max(1, features)
    k = math.prod(int(kernel[d]) for d in numbers.rhs_spec[1:])
    return Gemm("conv", max(1, rows), max(1, features // groups), max(1, k), groups)
