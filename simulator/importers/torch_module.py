"""Models from a PyTorch module, traced on the meta device: no memory, no arithmetic.

The module's forward and backward run once with shapes only; every ATen operation becomes an
operation of the layer it belongs to. FLOPs are counted with the formulas of
`torch.utils.flop_counter`. Scaled-dot-product attention counts as one fused kernel.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from simulator.model.operations import Attention, Gemm, MemoryBound, Phase

#: Operations that allocate or rename but move nothing.
_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "_unsafe_view", "lift_fresh", "scalar_tensor", "_reshape_alias", "sym_size", "sym_numel",
}  # fmt: skip

#: Class of a memory-bound kernel by the beginning of its ATen name.
_CLASSES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norm", ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm",
              "cudnn_batch_norm", "_batch_norm", "_native_batch_norm", "batch_norm", "rms_norm")),
    ("softmax", ("_softmax", "_safe_softmax", "_log_softmax")),
    ("cross_entropy", ("nll_loss", "cross_entropy", "mse_loss", "binary_cross_entropy")),
    ("embedding", ("embedding", "index", "gather", "scatter", "select_backward",
                   "slice_backward")),
    ("activation", ("gelu", "silu", "relu", "threshold_backward", "sigmoid", "tanh", "elu",
                    "hardtanh", "leaky_relu", "mish", "hardswish", "glu", "softplus")),
    ("permute", ("sort", "topk", "argsort")),
    ("cast", ("_to_copy",)),
    ("copy", ("clone", "copy_", "cat", "stack", "zeros", "ones", "full", "fill", "zero_",
              "constant_pad", "repeat")),
)  # fmt: skip


def model_from_torch(
    module: Any,
    example_inputs: Any,
    *,
    name: str | None = None,
    loss: Callable[..., Any] | None = None,
    blocks: Sequence[str] = (),
    sequence_length: int | None = None,
) -> TracedModel:
    """Trace a `torch.nn.Module` on the meta device.

    Parameters
    ----------
    module:
        The module; it is not changed (a copy on the meta device is traced, in training mode).
    example_inputs:
        Tensor, tuple of positional, or mapping of keyword arguments of `forward`; dimension 0 of
        every tensor is the batch. Their values do not matter.
    name:
        Name of the model; the module's class when left out.
    loss:
        Called with the module's output; its result is what is differentiated. When left out, the
        output's gradient is taken as given.
    blocks:
        Patterns (`layers.*`) of the names of submodules that are layers; when left out, the
        outermost members of `ModuleList` and `Sequential` containers that have parameters.
    sequence_length:
        Tokens per sample; when left out, dimension 1 of a first input of integers, else 1.

    Returns
    -------
    TracedModel
        `to_mapping()` of it is an experiment's `model`.

    Raises
    ------
    InputError
        If torch is not installed, the inputs do not fit, or the module needs values (data
        -dependent shapes), which the meta device has not.
    """
    torch = optional("torch", "torch", "tracing a PyTorch module")
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(module).__name__}")
    args, kwargs = _arguments(example_inputs, torch)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not tensors or not tensors[0].dim():
        raise InputError("expected example inputs with a batch dimension", place="example_inputs")
    batch = int(tensors[0].shape[0])
    if batch < 1:
        raise InputError("the batch of the example inputs is empty", place="example_inputs")
    first = tensors[0]
    sequence = sequence_length or (
        int(first.shape[1])
        if not first.is_floating_point() and first.dim() == 2 and first.shape[1] > 0
        else 1
    )
    once = _trace(torch, module, args, kwargs, loss, blocks)
    layers, scalable = once, False
    if all(t.dim() and t.shape[0] == batch for t in tensors):
        doubled = [_doubled(value, torch) for value in args]
        named = {key: _doubled(value, torch) for key, value in kwargs.items()}
        layers, scalable = fit_doubled(
            once, lambda: _trace(torch, module, doubled, named, loss, blocks), batch
        )
    floats = [p for p in module.parameters() if p.is_floating_point()]
    return TracedModel(
        name=name or type(module).__name__,
        batch=batch,
        sequence=sequence,
        element_bytes=float(floats[0].element_size() if floats else 4),
        layers=layers,
        scalable=scalable,
        source=f"PyTorch {torch.__version__.split('+')[0]}, traced on the meta device",
    )


def _arguments(example: Any, torch: Any) -> tuple[list[Any], dict[str, Any]]:
    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_like(value, device="meta", requires_grad=False)
        return value

    if isinstance(example, Mapping):
        return [], {str(key): meta(value) for key, value in example.items()}
    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, tuple | list):
        raise InputError(
            f"expected a tensor, a tuple or a mapping, got {type(example).__name__}",
            place="example_inputs",
        )
    return [meta(value) for value in example], {}


def _doubled(value: Any, torch: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = (2 * value.shape[0], *value.shape[1:])
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _on_meta(module: Any, torch: Any) -> Any:
    """A copy of the module whose parameters and buffers have no storage."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo).train()


@dataclass(slots=True)
class _Record:
    """One ATen operation that moved or computed something."""

    operations: list[TracedKind]
    flops: float
    backward: bool
    layer: int
    region: int
    inputs: dict[int, int]
    """Storage -> elements."""
    outputs: dict[int, int]


@dataclass(slots=True)
class _Region:
    """One call of scaled-dot-product attention: a fused kernel on an accelerator."""

    layer: int
    forward: Attention
    name: str


@dataclass(slots=True)
class _State:
    """Where execution is. Layers as they run: 2 k + 1 is block k, 2 k what lies before it."""

    layer: int = 0
    path: str = ""
    """Name of the running submodule within its block."""
    region: int = -1
    marks: list[tuple[int, int, str, int]] = field(default_factory=list)
    """(autograd sequence number, layer, path, region) from which on they hold."""
    kept: list[Any] = field(default_factory=list)
    """Storages, which are told apart by address and so must live; not the tensors: autograd copies
    a gradient that someone else holds."""


def _trace(
    torch: Any,
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[..., Any] | None,
    patterns: Sequence[str],
) -> tuple[TracedLayer, ...]:
    copied = _on_meta(module, torch)
    chosen = _blocks(copied, patterns, torch)
    tracer = _Tracer(torch, copied, chosen)
    try:
        return tracer.run(args, kwargs, loss)
    except InputError:
        raise
    except Exception as error:  # whatever the user's module raises
        text = str(error).strip().splitlines()
        raise InputError(
            f"cannot be traced on the meta device: {type(error).__name__}: "
            f"{text[0] if text else ''}",
            place=type(module).__name__,
        ) from None


def _blocks(module: Any, patterns: Sequence[str], torch: Any) -> dict[str, Any]:
    """Submodules that are layers, by name."""
    named = dict(module.named_modules())

    def trains(candidate: Any) -> bool:
        return next(candidate.parameters(), None) is not None

    if patterns:
        found = {
            name: sub
            for name, sub in named.items()
            if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
        found = {n: m for n, m in found.items() if not any(n.startswith(f"{o}.") for o in found)}
        if not found:
            raise InputError(
                f"no submodule is called like {', '.join(map(repr, patterns))}", place="blocks"
            )
        return found
    containers = (torch.nn.ModuleList, torch.nn.Sequential)
    members: dict[str, Any] = {}
    for name, sub in named.items():
        if any(name.startswith(f"{outer}.") for outer in members):
            continue
        parent = named.get(name.rpartition(".")[0]) if name else None
        if parent is not None and isinstance(parent, containers) and trains(sub):
            if isinstance(sub, containers) and any(trains(child) for child in sub):
                continue  # a container of containers: its members are the layers
            members[name] = sub
    return members


class _Tracer:
    def __init__(self, torch: Any, module: Any, blocks: Mapping[str, Any]) -> None:
        self.torch = torch
        self.module = module
        self.blocks = blocks
        self.block_names: list[str] = []
        """Name of the module of every layer, in order of execution."""
        self.callers: list[tuple[str, str]] = []
        """Running submodules, and the path to return to from each."""
        self.state = _State()
        self.records: list[_Record] = []
        self.regions: list[_Region] = []
        self.stored: dict[int, dict[int, float]] = {}
        """Layer -> storage -> bytes kept for the backward."""
        self.output_bytes: dict[int, float] = {}
        self.final_bytes = 0.0
        self.parameter_storages = {
            p.untyped_storage()._cdata for p in [*module.parameters(), *module.buffers()]
        }

    # -- running -------------------------------------------------------------------------------

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], loss: Callable[..., Any] | None
    ) -> tuple[TracedLayer, ...]:
        torch = self.torch
        handles = []
        for name, sub in self.module.named_modules():
            handles.append(sub.register_forward_pre_hook(self._entering(name)))
            handles.append(sub.register_forward_hook(self._leaving(name), always_call=True))
        recorder, attention = self._modes()
        hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda value: value)
        self._mark()
        with torch.enable_grad(), recorder, attention, hooks, self._patched():
            output = self.module(*args, **kwargs)
            if loss is not None:
                output = loss(output)
        for handle in handles:
            handle.remove()
        results = [t for t in _tensors(output, torch) if t.requires_grad]
        self.final_bytes = float(sum(_bytes(t) for t in _tensors(output, torch)))
        if results:
            gradients = [torch.empty_like(t) for t in results]
            with recorder:
                torch.autograd.backward(results, gradients)
        return self._layers()

    def _mark(self) -> None:
        state = self.state
        number = self.torch.autograd._get_sequence_nr()
        state.marks.append((number, state.layer, state.path, state.region))

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            state = self.state
            self.callers.append((name, state.path))
            if name in self.blocks:
                self.block_names.append(name)
                state.layer = 2 * len(self.block_names) - 1
            inside = next((b for b, _ in reversed(self.callers) if b in self.blocks), "")
            state.path = name[len(inside) :].strip(".") if name.startswith(inside) else name
            self._mark()

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            state = self.state
            if name in self.blocks:
                size = sum(_bytes(t) for t in _tensors(output, self.torch))
                self.output_bytes[state.layer] = float(size)
                state.layer = 2 * len(self.block_names)
            _, state.path = self.callers.pop()
            self._mark()

        return hook

    def _save(self, tensor: Any) -> Any:
        if self.state.region < 0:
            self._keep(tensor)
        return tensor

    def _keep(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.parameter_storages or any(key in kept for kept in self.stored.values()):
            return
        self.state.kept.append(storage)
        size = min(float(storage.nbytes()), _bytes(tensor))
        self.stored.setdefault(self.state.layer, {})[key] = size

    def _modes(self) -> tuple[Any, Any]:
        torch, tracer = self.torch, self
        from torch.overrides import TorchFunctionMode
        from torch.utils._python_dispatch import TorchDispatchMode

        fused = torch.nn.functional.scaled_dot_product_attention

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                output = func(*args, **(kwargs or {}))
                tracer.record(func, args, kwargs or {}, output)
                return output

        class Attending(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func is not fused or tracer.state.region >= 0:
                    return func(*args, **(kwargs or {}))
                return tracer.attend(func, args, dict(kwargs or {}))

        return Recorder(), Attending()

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """Attention inside torch's own Python functions, which no function mode sees."""
        functional = self.torch.nn.functional
        fused = functional.scaled_dot_product_attention

        def attending(*args: Any, **kwargs: Any) -> Any:
            return self.attend(fused, args, kwargs)

        functional.scaled_dot_product_attention = attending
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = fused

    def attend(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Scaled-dot-product attention: what it consists of is recorded as one region."""
        query, key, value = (
            *args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])
        )[:3]  # fmt: skip
        state = self.state
        names = ("attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args[3:], strict=False)) | kwargs
        heads = int(query.shape[-3]) if query.dim() > 3 else 1
        path = f"{state.path}.attention" if state.path else "attention"
        op = Attention(
            name=path,
            batch=math.prod(query.shape[:-3]) if query.dim() > 3 else math.prod(query.shape[:-2]),
            heads=heads,
            kv_heads=int(key.shape[-3]) if key.dim() > 3 else 1,
            q_len=int(query.shape[-2]),
            kv_len=int(key.shape[-2]),
            qk_dim=int(query.shape[-1]),
            v_dim=int(value.shape[-1]),
            causal=bool(given.get("is_causal", False)),
        )
        state.region = len(self.regions)
        self.regions.append(_Region(state.layer, op, path))
        self._mark()
        output = func(*args, **kwargs)
        state.region = -1
        self._mark()
        for tensor in (query, key, value, output):
            self._keep(tensor)
        # the fused kernel keeps one fp32 statistic per query and head
        statistics = self.stored.setdefault(state.layer, {})
        statistics[-len(self.regions)] = 4.0 * op.batch * heads * op.q_len
        return output

    # -- recording -----------------------------------------------------------------------------

    def record(self, func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        torch, state = self.torch, self.state
        name = func._schema.name.split("::")[-1]
        outputs = _tensors(output, torch)
        inputs = _tensors((*args, *kwargs.values()), torch)
        node = torch._C._current_autograd_node()
        backward = node is not None
        layer, region, path = state.layer, state.region, None
        if node is not None:
            number = node._sequence_nr()
            if number >= 2**63:  # AccumulateGrad: belongs to what came before
                last = self.records[-1] if self.records else None
                if last is not None and last.backward:
                    layer = last.layer
                region, path = -1, ""
            else:
                position = bisect.bisect_right(state.marks, number, key=lambda mark: mark[0])
                _, layer, path, region = state.marks[max(0, position - 1)]
        view = any(r.alias_info is not None and not r.alias_info.is_write
                   for r in func._schema.returns)  # fmt: skip
        if view or name in _FREE or not outputs:
            return
        path = state.path if path is None else path
        flops = self._flops(func, args, kwargs, output)
        title = f"{path}.{name}" if path else name
        operations = self._operations(name, title, args, inputs, outputs, flops, backward)
        state.kept.extend(t.untyped_storage() for t in outputs)
        self.records.append(
            _Record(
                operations,
                flops,
                backward,
                layer,
                region,
                {t.untyped_storage()._cdata: int(t.numel()) for t in inputs},
                {t.untyped_storage()._cdata: int(t.numel()) for t in outputs},
            )
        )

    def _flops(self, func: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> float:
        from torch.utils.flop_counter import flop_registry

        formula = flop_registry.get(func._overloadpacket)
        return float(formula(*args, **kwargs, out_val=output)) if formula else 0.0

    def _operations(
        self,
        name: str,
        title: str,
        args: Any,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        flops: float,
        backward: bool,
    ) -> list[TracedKind]:
        phase = Phase.INPUT_GRADIENT if backward else Phase.FORWARD
        if name in ("mm", "addmm", "_scaled_mm"):
            a, b = (args[1], args[2]) if name == "addmm" else (args[0], args[1])
            return [Gemm(title, int(a.shape[0]), int(b.shape[1]), int(a.shape[1]), phase=phase)]
        if name in ("bmm", "baddbmm"):
            a, b = (args[1], args[2]) if name == "baddbmm" else (args[0], args[1])
            m, k, n = int(a.shape[1]), int(a.shape[2]), int(b.shape[2])
            return [Gemm(title, m, n, k, int(a.shape[0]), phase=phase)]
        if name == "convolution":
            return [_convolution(title, args[0], args[1], outputs[0], args[6], args[8], phase)]
        if name == "convolution_backward":
            return _convolution_backward(title, args)
        read = sum(_bytes(t) for t in inputs)
        written = sum(_bytes(t) for t in outputs)
        if name == "embedding" or name.startswith(("index", "gather")):
            # only the rows that are looked up are read
            read = written + sum(_bytes(t) for t in inputs if not t.is_floating_point())
        kind = next((kind for kind, starts in _CLASSES if name.startswith(starts)), "elementwise")
        return [MemoryBound(title, kind, read, written, flops, phase=phase)]

    # -- layers --------------------------------------------------------------------------------

    def _role(self, code: int) -> int:
        """Index of the layer: -1 before the first block, the number of blocks after the last."""
        last = len(self.block_names) - 1
        if code % 2:
            return code // 2
        before = code // 2 - 1
        return before + 1 if before == last and last >= 0 else before

    def _layers(self) -> tuple[TracedLayer, ...]:
        blocks = len(self.block_names)
        weight_gradients = self._weight_gradients()
        parameters = self._parameters()
        stored: dict[int, float] = {}
        for code, kept in self.stored.items():
            stored[self._role(code)] = stored.get(self._role(code), 0.0) + sum(kept.values())
        grouped: dict[int, list[_Record]] = {}
        for position, record in enumerate(self.records):
            if position in weight_gradients:
                record = _as_weight_gradient(record)
            grouped.setdefault(self._role(record.layer), []).append(record)
        layers: list[TracedLayer] = []
        for index in range(-1, blocks + 1):
            role = "embedding" if index < 0 else ("head" if index == blocks else "block")
            mine = grouped.get(index, [])
            if role != "block" and not mine and not parameters.get(index):
                continue
            forward = self._merged([r for r in mine if not r.backward])
            backward = self._merged([r for r in mine if r.backward])
            # What comes before the first block hands on what that takes, which has its size.
            output = self.output_bytes.get(2 * index + 1) or self.output_bytes.get(1, 0.0)
            if role == "head" or not blocks:
                output = self.final_bytes
            layers.append(
                TracedLayer(
                    name=self.block_names[index] if role == "block" else role,
                    role=role,
                    parameters=parameters.get(index, 0),
                    output_bytes=output,
                    stored_bytes=stored.get(index, 0.0),
                    forward=tuple(TracedOperation(op) for op in forward),
                    backward=tuple(TracedOperation(op) for op in backward),
                    forward_flops=sum(r.flops for r in mine if not r.backward),
                    backward_flops=sum(r.flops for r in mine if r.backward),
                )
            )
        if not blocks:  # no containers: the whole module is one layer
            return tuple(dataclasses.replace(layer, role="block", name="model") for layer in layers)
        return tuple(layers)

    def _merged(self, records: Sequence[_Record]) -> list[TracedKind]:
        """Operations in order, every attention region as its fused kernel."""
        merged: list[TracedKind] = []
        done: set[int] = set()
        for record in records:
            if record.region < 0:
                merged.extend(record.operations)
            elif record.region not in done:
                done.add(record.region)
                op = self.regions[record.region].forward
                if record.backward:
                    op = dataclasses.replace(op, phase=Phase.INPUT_GRADIENT)
                merged.append(op)
        return merged

    def _parameters(self) -> dict[int, int]:
        """Parameters by layer; a shared one belongs to the layer that uses it first."""
        counts: dict[int, int] = {}
        seen: set[int] = set()
        first = {name: i for i, name in reversed(list(enumerate(self.block_names)))}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            storage = parameter.untyped_storage()._cdata
            used = next((self._role(r.layer) for r in self.records if storage in r.inputs), None)
            if used is None:
                used = next((i for block, i in first.items() if name.startswith(f"{block}.")), -1)
            counts[used] = counts.get(used, 0) + int(parameter.numel())
        return counts

    def _weight_gradients(self) -> set[int]:
        """Positions of backward records that make nothing but gradients of parameters.

        From a gradient back: the record that makes it, and through copies, casts and sums of
        tensors of the same size those that make their inputs; unless an input gradient needs them.
        """
        wanted = {
            p.grad.untyped_storage()._cdata for p in self.module.parameters() if p.grad is not None
        }
        elsewhere: set[int] = set()
        found: set[int] = set()
        for position in range(len(self.records) - 1, -1, -1):
            record = self.records[position]
            if not record.backward:
                break
            made = record.outputs.keys()
            if record.region >= 0 or made & elsewhere or not made & wanted:
                elsewhere |= record.inputs.keys()
                continue
            found.add(position)
            sizes = set(record.outputs.values())
            moves = all(isinstance(op, MemoryBound) for op in record.operations)
            for storage, elements in record.inputs.items():
                if moves and elements in sizes and storage not in elsewhere:
                    wanted.add(storage)
                else:
                    elsewhere.add(storage)
        return found


def _as_weight_gradient(record: _Record) -> _Record:
    changed = [dataclasses.replace(op, phase=Phase.WEIGHT_GRADIENT) for op in record.operations]
    return dataclasses.replace(record, operations=changed)


def _tensors(value: Any, torch: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item, torch)]
    if hasattr(value, "__dict__") and not isinstance(value, type):
        items = [item for item in vars(value).values() if isinstance(item, torch.Tensor | tuple)]
        return [tensor for item in items for tensor in _tensors(item, torch)]
    return []


def _bytes(tensor: Any) -> float:
    """Bytes of a tensor; of an expanded one, those that exist."""
    whole = float(tensor.numel() * tensor.element_size())
    return min(whole, float(tensor.untyped_storage().nbytes()))


def _convolution(
    title: str, x: Any, weight: Any, out: Any, transposed: bool, groups: int, phase: Phase
) -> Gemm:
    """A convolution as an implicit matrix product: rows are output (transposed: input) pixels."""
    pixels = x if transposed else out
    m = int(pixels.shape[0]) * math.prod(int(d) for d in pixels.shape[2:])
    filters = math.prod(int(d) for d in weight.shape[2:])
    if transposed:
        k, n = int(weight.shape[0]) // groups, int(weight.shape[1]) * filters
    else:
        k, n = int(weight.shape[1]) * filters, int(weight.shape[0]) // groups
    return Gemm(title, m, n, k, groups, phase=phase)


def _convolution_backward(title: str, args: Any) -> list[TracedKind]:
    gradient, x, weight = args[0], args[1], args[2]
    transposed, groups, mask = bool(args[7]), int(args[9]), args[10]
    forward = _convolution(title, x, weight, gradient, transposed, groups, Phase.FORWARD)
    result: list[TracedKind] = []
    if mask[0]:
        result.append(
            Gemm(f"{title}.dgrad", forward.m, forward.k, forward.n, groups,
                 phase=Phase.INPUT_GRADIENT)
        )  # fmt: skip
    if mask[1]:
        result.append(
            Gemm(f"{title}.wgrad", forward.n, forward.k, forward.m, groups,
                 phase=Phase.WEIGHT_GRADIENT)
        )  # fmt: skip
    return result
