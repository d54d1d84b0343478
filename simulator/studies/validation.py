"""Published training steps against simulated ones.

Works on any table in the form of the shipped `published.csv`: one row per measured configuration.
Every row becomes an experiment by the same general rules (`experiment_from_row`): the hardware by
its name, the model by its dimensions, the framework by its name, behaviours that the row's notes
state (`simulator.studies.row_notes`). No rule looks at a row's identity or its measured time.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.catalog.accelerators import Accelerator, accelerator
from simulator.catalog.frameworks import FrameworkProfile, framework
from simulator.costs.collectives_predict import (
    machine_topology,
    reference_rate,
    slice_topology,
)
from simulator.errors import InputError
from simulator.experiment import Cluster, Experiment, Overlap, Parallel, Training
from simulator.studies.recipes import bridge_recipe, nemo_expert_recipe
from simulator.studies.row_notes import section, stated
from simulator.studies.row_values import read_values

if TYPE_CHECKING:
    from simulator.plan.memory import MemoryReport
    from simulator.summary import Summary

PUBLISHED = Path(__file__).parents[1] / "catalog" / "published_steps.csv"
#: Steps collected later, on other hardware and software: a check of what carries over.
FURTHER = PUBLISHED.with_name("further_steps.csv")

REQUIRED = ("id", "model", "seq", "gpu", "n_gpus", "step_time_s")


@dataclass(frozen=True)
class RowResult:
    """One row of the comparison; `reason` says why a row could not be simulated."""

    id: str
    family: str
    measured_step_time_s: float
    simulated_step_time_s: float | None
    reason: str = ""
    fits: bool | None = None
    breakdown_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    low_s: float | None = None
    high_s: float | None = None
    assumed: str = ""
    """What the row leaves open and a default stands for."""
    accelerator_family: str = ""
    group: str = ""
    """Sweep that the row belongs to: model, cluster, batch and publication are the same."""
    layout: str = ""
    """What a sweep varies: parallelism, micro-batches, sharding, recomputation."""

    @property
    def error(self) -> float | None:
        """Signed relative error, simulated / measured - 1."""
        if self.simulated_step_time_s is None:
            return None
        return self.simulated_step_time_s / self.measured_step_time_s - 1.0


# ------------------------------------------------------------------------ reading a table


def read_rows(path: str | Path | None = None, *, everything: bool = False) -> list[dict[str, str]]:
    """Rows of a published-steps table (the shipped one by default).

    `everything`: also rows that are not `canonical` (slower repeats).

    Raises
    ------
    InputError
        If the file cannot be read, is no CSV or lacks required columns.
    """
    source = Path(path) if path is not None else PUBLISHED
    try:
        with source.open(encoding="utf-8", newline="") as file:
            lines = (line for line in file if not line.startswith("#"))
            reader = csv.DictReader(lines)
            header = reader.fieldnames or []
            missing = [name for name in REQUIRED if name not in header]
            if missing:
                raise InputError(
                    f"lacks the column(s) {', '.join(missing)}; expected the columns of the "
                    "published-steps table",
                    place=str(source),
                )
            rows = [
                {key: (value or "").strip() for key, value in row.items() if key is not None}
                for row in reader
            ]
    except FileNotFoundError:
        raise InputError("no such file", place=str(source)) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read as CSV: {error}", place=str(source)) from None
    if everything:
        return rows
    return [row for row in rows if row.get("canonical", "").casefold() not in _NOT_CANONICAL]


_NOT_CANONICAL = ("0", "0.0", "false", "no")


def _number(row: Mapping[str, str], key: str, default: float | None = None) -> float | None:
    text = row.get(key, "")
    if text == "":
        return default
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"expected a number, got {text!r}", place=key) from None
    if not math.isfinite(value):
        raise InputError(f"expected a finite number, got {text!r}", place=key)
    return value


def _integer(row: Mapping[str, str], key: str, default: int | None = None) -> int | None:
    value = _number(row, key)
    if value is None:
        return default
    if value != int(value) or value < 0:
        raise InputError(f"expected a whole number, got {value:g}", place=key)
    return int(value)


def _need(value: int | None, key: str) -> int:
    if value is None or value < 1:
        raise InputError("missing", place=key)
    return value


# ------------------------------------------------------------------- a row as an experiment


@dataclass(frozen=True)
class Named:
    """What a framework's name stands for."""

    pattern: str
    """Searched in the folded words of the columns `framework` and `sharding`."""
    profile: str
    before: float = math.inf
    """Only for rows of years before this one."""


#: Framework profiles, first match wins. Years: flash attention and the overlap options came to
#: Megatron-LM (and flash attention to GPT-NeoX and to JAX on TPU) in 2023, FSDP2 to PyTorch in
#: 2024; DeepSpeed gathers into flat tensors since 2022.
_FRAMEWORKS: tuple[Named, ...] = (
    Named(r"llm-foundry|composer|mosaicml", "llm-foundry"),
    Named(r"megatron-bridge", "megatron-bridge"),
    Named(r"automodel", "nemo-automodel"),
    Named(r"nemo", "nemo"),
    Named(r"(torchtitan|torchtune|olmo-?core).*compile", "torchtitan-compile"),
    Named(r"torchtitan|torchtune|vescale", "torchtitan"),
    Named(r"olmo-?core|olmo ?[23]", "torchtitan-compile"),
    Named(r"olmo", "pytorch-fsdp1"),
    Named(r"fms", "fms-fsdp"),
    Named(r"maxtext", "maxtext"),
    Named(r"pax.*transformerengine|pax.*\bte\b", "paxml-te"),
    Named(r"pax", "paxml"),
    Named(r"internevo|internlm", "internevo"),
    Named(r"nxd|neuron", "neuronx-distributed"),
    Named(r"hai-?llm", "hai-llm"),
    Named(r"nanotron", "nanotron"),
    Named(r"\bmeta\b", "meta-llama3"),
    Named(r"colossal", "colossalai"),
    Named(r"deepspeed.*zero-?3", "deepspeed-zero3", before=2022),
    Named(r"megatron-?deepspeed|neox", "megatron-deepspeed-2021", before=2023),
    Named(r"neox", "megatron-deepspeed-2023", before=2024),
    Named(r"megatron-?deepspeed|neox", "megatron-deepspeed"),
    Named(r"deepspeed.*zero-?3", "deepspeed-stage3"),
    Named(r"deepspeed", "deepspeed"),
    # its default configuration overlaps the optimizer's collectives
    Named(r"primus", "megatron-core"),
    Named(r"megatron-?lm", "megatron-lm-2021", before=2023),
    Named(r"megatron-?lm", "megatron-lm"),
    Named(r"megatron-?core|megatron", "megatron-core"),
    Named(r"t5x.*(transformerengine|\bte\b)", "t5x-te"),
    Named(r"t5x|mesh[- ]t|alpa\b|\bpalm\b|pathways", "xla-unfused"),
    Named(r"(tensorflow|keras|\btf ?2?\b).*\bxla|\bxla.*(tensorflow|keras)", "tensorflow-xla"),
    Named(r"tensorflow|keras|\btf ?2?\b", "tensorflow"),
    Named(r"horovod", "horovod"),
    Named(r"jax|xla|flax|levanter|easylm|axlearn", "xla-unfused", before=2023),
    Named(r"jax|xla|flax|levanter|easylm|axlearn", "maxtext"),
    Named(r"lit-?gpt|tinyllama|lightning(?!.*ddp)|fabric", "litgpt"),
    Named(r"(fsdp|fully_?shard).*compile|compile.*(fsdp|fully_?shard)", "torchtitan-compile"),
    Named(r"(pytorch|torch|ddp|nanogpt).*compile|torch\.?compile", "pytorch-compile"),
    Named(r"(torch|fsdp|ddp).*(transformer ?engine|\bte\b)|transformer ?engine", "pytorch-te"),
    Named(
        r"(hf|hugging ?face|transformers|accelerate|axolotl|llama-?factory|\btrl\b).*\bddp",
        "pytorch",
    ),
    Named(
        r"\bhf\b|hugging ?face|transformers|accelerate|axolotl|llama-?factory|\btrl\b",
        "huggingface",
    ),
    Named(r"fsdp2", "torchtitan"),
    Named(r"fsdp|fairscale|metaseq", "pytorch-fsdp1", before=2024),
    Named(r"fsdp", "torchtitan"),
    Named(r"pytorch|torch|ddp|nanogpt|lightning", "pytorch"),
)

#: Sharding that a framework's name says, for rows that state none.
_SHARDING: tuple[tuple[str, str], ...] = (
    (r"zero(?:[- ]?stage)?[- ]?3|fsdp|fully_?shard|automodel", "zero3"),
    (r"llm-foundry|composer|mosaicml|torchtitan", "zero3"),
    (r"zero(?:[- ]?stage)?[- ]?2", "zero2"),
    (r"zero(?:[- ]?stage)?[- ]?1|megatron-?deepspeed|neox", "zero1"),
)


def framework_of_row(row: Mapping[str, str]) -> dict[str, Any]:
    """The framework profile that a row's framework, year and notes name."""
    name = row.get("framework", "").casefold()
    year = _number(row, "year", 2024.0) or 2024.0
    words = f"{name} {row.get('sharding', '')}"
    base = next(
        (
            item.profile
            for item in _FRAMEWORKS
            if year < item.before and re.search(item.pattern, words)
        ),
        "megatron-core",
    )
    if base == "megatron-core" and sharding_of_row(row) == "zero3":
        base = "megatron-fsdp"
    own: dict[str, Any] = {"base": base}
    if base == "megatron-bridge" and (_number(row, "n_experts", 0.0) or 0.0) > 1:
        release = re.search(r"nemo container (\d+\.\d+)", row.get("notes", "").casefold())
        own |= bridge_recipe(
            row.get("model", ""),
            device_of_row(row).name,
            row.get("precision", ""),
            float(release[1]) if release else None,
            drops="training.expert_capacity_factor" in stated(row),
        )
    if base.startswith("megatron-deepspeed") and row.get("precision") == "fp16":
        # DeepSpeed's fp16 optimizer keeps and reduces gradients in fp16, its bf16 optimizer in fp32
        own |= {"main_grad_bytes": 2.0, "grad_reduce_bytes": 2.0}
    return {**own, **section(stated(row), "framework.")}


def _usual(row: Mapping[str, str]) -> FrameworkProfile:
    """What the row's framework does where the row does not say."""
    return framework(framework_of_row(row)["base"])


def sharding_of_row(row: Mapping[str, str]) -> str:
    """The sharding that a row states, or else what its framework's name says; `none` otherwise."""
    stated_sharding = row.get("sharding", "")
    if stated_sharding:
        return stated_sharding
    name = row.get("framework", "").casefold()
    return next((value for pattern, value in _SHARDING if re.search(pattern, name)), "none")


def experiment_from_row(
    row: Mapping[str, str],
    *,
    micro_batch: int | None = None,
    recompute: str | None = None,
    share: float = 1.0,
    behaviours: Mapping[str, Any] | None = None,
) -> Experiment:
    """A row as an experiment; `micro_batch` and `recompute` fill fields that the row leaves empty.

    `recompute` may be `offload` too: activations go to the host. `share`: of the layers of each
    stage, with an unstated full recomputation or offloading. `behaviours` change the framework's
    profile.

    Raises
    ------
    InputError
        If a field is missing, no number, or names unknown hardware.
    """
    from simulator.model.lookup import mapping_from_row

    row = read_values(row)
    notes = stated(row)
    model = {**mapping_from_row(row), **section(notes, "model.")}
    gpus = _need(_integer(row, "n_gpus"), "n_gpus")
    tensor = _integer(row, "tp", 1) or 1
    pipeline = _integer(row, "pp", 1) or 1
    context = _integer(row, "cp", 1) or 1
    expert = _integer(row, "ep", 1) or 1
    virtual = _integer(row, "vpp", 1) or 1
    data = gpus // (tensor * pipeline * context)
    sharding = sharding_of_row(row)
    shard_group = _integer(row, "shard_group")
    if shard_group is not None and shard_group >= data * context:
        shard_group = None
    micro = _integer(row, "micro_batch") or micro_batch
    accumulation = _integer(row, "grad_accum")
    batch = _integer(row, "global_batch")
    if batch and accumulation and data and batch % (data * accumulation) == 0:
        # where model parallelism spans chips, tables count sequences per chip
        micro = batch // (data * accumulation)
    micro = micro or 1
    if batch is None:
        batch = micro * data * (accumulation or 1)
    schedule = row.get("schedule", "") or None
    if schedule == "interleaved-1f1b" and virtual == 1:
        if row.get("vpp", ""):
            schedule = "1f1b"
        else:
            virtual = int(_usual(row).default_virtual_stages)
            schedule = schedule if virtual > 1 else "1f1b"
    wanted_recompute = row.get("recompute", "") or recompute or "none"
    profile = framework_of_row(row)
    if profile["base"] == "nemo" and (_number(row, "n_experts", 0.0) or 0.0) > 1:
        notes = {**nemo_expert_recipe(row.get("model", ""), pipeline, virtual), **notes}
    training = section(notes, "training.")
    recompute_layers = training.pop("recompute_layers", None)
    recompute_modules = training.pop("recompute_modules", None)
    offloads = wanted_recompute == "offload"
    if offloads:
        wanted_recompute = "none"
        training["activation_offload"] = True
    if share < 1.0:
        layers = math.ceil(share * (model["layers"] / (pipeline * virtual)))
        if offloads:
            training["activation_offload_layers"] = layers
        else:
            recompute_layers = layers
    return Experiment(
        name=row.get("id", ""),
        model=model,
        cluster=cluster_of_row(row, gpus),
        parallel=Parallel(
            data=data,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            virtual_stages=virtual,
            sequence_parallel=bool(_number(row, "seq_parallel", 0.0)),
            sharding=sharding,  # type: ignore[arg-type]
            shard_group=shard_group,
            schedule=schedule,
            **{key: value for key, value in section(notes, "parallel.").items() if "." not in key},
            overlap=Overlap(**section(notes, "parallel.overlap.")),
        ),
        training=Training(
            micro_batch_size=micro,
            global_batch_size=batch,
            sequence_length=_need(_integer(row, "seq"), "seq"),
            precision=(row.get("precision", "") or "bf16"),  # type: ignore[arg-type]
            recompute=wanted_recompute,  # type: ignore[arg-type]
            recompute_modules=recompute_modules if wanted_recompute == "selective" else None,
            recompute_layers=recompute_layers if wanted_recompute == "full" else None,
            **training,
        ),
        framework={**profile, **(behaviours or {})},
    )


def device_of_row(row: Mapping[str, str]) -> Accelerator:
    """The accelerator that a row counts.

    Frameworks address each of the two dies (GCDs) of an MI250 or MI250X as a device. Nodes have
    four packages (Frontier, LUMI, the OAM platform), so that eight per node are dies; MI250X is a
    part of supercomputers, whose tables count dies also where they do not say how many per node.
    """
    chip = accelerator(row["gpu"])
    per_node = _integer(row, "gpus_per_node")
    if chip.name in ("MI250", "MI250X") and (per_node or 0) > 4:
        return accelerator(f"{chip.name}-GCD")
    if chip.name == "MI250X" and per_node is None:
        return accelerator("MI250X-GCD")
    return chip


def cluster_of_row(row: Mapping[str, str], gpus: int) -> Cluster:
    """The cluster that a row names: accelerator, accelerators per node, network line rate."""
    chip = device_of_row(row)
    rate = _number(row, "network_gbps_per_gpu")
    network = row.get("internode_network", "")
    line_rate = f"{rate:g} Gb/s" if rate else None
    if chip.family == "trainium":
        return Cluster(topology=slice_topology(chip), accelerators=gpus, network=line_rate)
    if chip.kind == "tpu":
        slices = re.search(r"\((\d+) slices?\)", network)
        count = int(slices.group(1)) if slices else 1
        return Cluster(topology=slice_topology(chip), nodes=count, accelerators=gpus)
    per_node = min(_integer(row, "gpus_per_node") or 8, gpus)
    default = f"InfiniBand {rate:g}G per GPU" if rate else unstated_network(chip.family)
    rack = "NVL72" if "nvl72" in row["gpu"].casefold() else ""
    topology = machine_topology(
        chip.name,
        per_node,
        f"NVLink + {network} {rack}",
        n_nodes=-(-gpus // per_node),
        default_network=default,
    )
    return Cluster(
        topology=topology,
        accelerators=gpus,
        network=line_rate if "network" in topology else None,
    )


def unstated_network(family: str) -> str:
    """The network between nodes where a row states none (`network_gbps_per_gpu` empty or 0, and no
    rate in `internode_network`): that of the GPU family's reference system, InfiniBand of 100 Gb/s
    per GPU (Pascal, Volta), 200 (Ampere and families without one) or 400 (Hopper, Blackwell,
    CDNA 3 and 4)."""
    return f"InfiniBand {reference_rate(family)}G per GPU"


def _assumed_network(row: Mapping[str, str]) -> str:
    """What is said about a network that the row leaves open; nothing where none is needed."""
    chip = device_of_row(row)
    gpus = _need(_integer(row, "n_gpus"), "n_gpus")
    per_node = min(_integer(row, "gpus_per_node") or 8, gpus)
    if chip.kind == "tpu" or gpus <= per_node or _number(row, "network_gbps_per_gpu"):
        return ""
    if "nvl72" in row["gpu"].casefold() and gpus <= 72:
        return ""
    if re.search(r"\d\s*G|[xnhe]dr\b", row.get("internode_network", ""), re.IGNORECASE):
        return ""
    return f"network not stated: {unstated_network(chip.family)}"


# ----------------------------------------------------------------------------- simulating


def simulate_row(row: Mapping[str, str], behaviours: Mapping[str, Any] | None = None) -> RowResult:
    """Simulate one row; a row that cannot be simulated comes back with the reason.

    `behaviours` change the profile of the row's framework.
    """
    identity = row.get("id", "?")
    family = row.get("family", "") or "all"
    measured = float("nan")
    try:
        row = read_values(row)
        measured = _number(row, "step_time_s") or float("nan")
        if not measured > 0.0:
            raise InputError("expected a positive measured time", place="step_time_s")
        memory, summary = _simulate_best(row, behaviours)
    except InputError as error:
        return RowResult(identity, family, measured, None, str(error).replace("\n", "; "))
    return RowResult(
        identity,
        family,
        measured,
        summary.step_time_s,
        fits=memory.fits,
        breakdown_s=dict(summary.breakdown_s),
        low_s=summary.step_time_low_s,
        high_s=summary.step_time_high_s,
        assumed=_assumed_network(row),
        accelerator_family=device_of_row(row).family,
        group="|".join(row.get(key, "") for key in _SWEEP),
        layout="|".join(row.get(key, "") for key in _LAYOUT),
    )


#: Rows that agree in these were measured together: a difference between them is their layout's,
#: not that of another software release (a source names its release).
_SWEEP = (
    "family",
    "model",
    "seq",
    "gpu",
    "n_gpus",
    "global_batch",
    "precision",
    "framework",
    "source",
    "year",
)
_LAYOUT = ("tp", "pp", "vpp", "cp", "ep", "micro_batch", "sharding", "shard_group", "recompute")


def _simulate_best(
    row: Mapping[str, str], behaviours: Mapping[str, Any] | None
) -> tuple[MemoryReport, Summary]:
    """Simulate a row; what it leaves open is chosen as a practitioner would.

    Unstated recomputation: the least that fits (or what the framework does by default). Unstated
    micro-batch: of 1, 2 and 4 (SC21's choices) the fastest that fits.
    """
    from simulator.simulation import plan_memory, resolve
    from simulator.studies.steady_state import step_summary

    best: tuple[MemoryReport, Summary] | None = None
    for mode, share in _open_recompute(row):
        options = []
        for size in _open_micro_batches(row):
            experiment = experiment_from_row(
                row, micro_batch=size, recompute=mode, share=share, behaviours=behaviours
            )
            plan, cluster = resolve(experiment)
            options.append((plan_memory(plan), experiment, plan, cluster))
        fitting = [option for option in options if _could_fit(option[0])]
        for memory, experiment, plan, cluster in fitting:
            summary = step_summary(experiment, cluster=cluster, plan=plan)
            if best is None or summary.step_time_s < best[1].step_time_s:
                best = memory, summary
        if best is not None:
            return best
    # nothing fits: what needs least, simulated all the same
    memory, experiment, plan, cluster = min(options, key=lambda option: option[0].peak)
    return memory, step_summary(experiment, cluster=cluster, plan=plan)


#: A published configuration did run: an estimate this much over the capacity is the estimate's
#: error (published peak memories are met within about 15 %), not a reason to assume recomputation.
_MEMORY_TOLERANCE = 1.15


def _could_fit(memory: MemoryReport) -> bool:
    return memory.capacity is None or memory.peak <= _MEMORY_TOLERANCE * memory.capacity


def _open_recompute(row: Mapping[str, str]) -> Sequence[tuple[str | None, float]]:
    """(mode, share of the layers) in the order in which they cost more."""
    if row.get("recompute"):
        return ((None, 1.0),)
    profile = _usual(row)
    if profile.default_recompute:
        return ((profile.default_recompute, 1.0),)
    shares = (0.25, 0.5, 0.75, 1.0)
    modes = [("none", 1.0), ("selective", 1.0)]
    fast_host = device_of_row(row).host_bandwidth >= _COHERENT_HOST
    if profile.fsdp_offload and fast_host and sharding_of_row(row) == "zero3":
        modes += [("offload", share) for share in shares]
    return [*modes, *(("full", share) for share in shares)]


#: byte/s per direction: hosts that NVLink-C2C joins to the accelerator, not PCIe.
_COHERENT_HOST = 150e9


def _open_micro_batches(row: Mapping[str, str]) -> Sequence[int | None]:
    if row.get("micro_batch") or row.get("grad_accum"):
        return (None,)
    gpus = _need(_integer(row, "n_gpus"), "n_gpus")
    data = gpus
    for key in ("tp", "pp", "cp"):
        data //= _integer(row, key, 1) or 1
    batch = _integer(row, "global_batch") or data
    ranks = _integer(row, "pp", 1) or 1
    profile = _usual(row)
    whole = data > 0 and batch % (data * ranks) == 0
    if whole and ranks > 1 and profile.default_pipeline_microbatches == "ranks":
        return (batch // (data * ranks),)
    return [size for size in (1, 2, 4) if data > 0 and batch % (size * data) == 0] or [1]


def validate(
    rows: Sequence[Mapping[str, str]],
    *,
    jobs: int = 1,
    progress: Callable[[RowResult], None] | None = None,
    behaviours: Mapping[str, Any] | None = None,
) -> list[RowResult]:
    """Simulate every row, in order; `progress` is called with each result as it comes.

    `behaviours` change the profiles of all rows' frameworks.
    """
    results = []
    simulate = functools.partial(simulate_row, behaviours=behaviours)
    if jobs > 1 and len(rows) > 1:
        with ProcessPoolExecutor(jobs) as pool:
            for result in pool.map(simulate, rows, chunksize=4):
                results.append(result)
                if progress:
                    progress(result)
        return results
    for row in rows:
        results.append(simulate(row))
        if progress:
            progress(results[-1])
    return results


# ------------------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class Statistics:
    """Errors of a set of rows, as fractions."""

    rows: int
    median_abs_error: float
    p90_abs_error: float
    signed_median_error: float


def statistics(errors: Sequence[float], weights: Sequence[float] | None = None) -> Statistics:
    """Median, 90th percentile and signed median of relative errors, optionally weighted."""
    values = np.asarray(errors, dtype=float)
    if len(values) == 0:
        return Statistics(0, math.nan, math.nan, math.nan)
    mass = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)
    return Statistics(
        len(values),
        weighted_quantile(np.abs(values), mass, 0.5),
        weighted_quantile(np.abs(values), mass, 0.9),
        weighted_quantile(values, mass, 0.5),
    )


def weighted_quantile(values: np.ndarray, weights: np.ndarray, quantile: float) -> float:
    """Quantile of a weighted sample, linear between the midpoints of the weights."""
    order = np.argsort(values, kind="stable")
    sorted_values, mass = values[order], weights[order]
    positions = (np.cumsum(mass) - 0.5 * mass) / mass.sum()
    return float(np.interp(quantile, positions, sorted_values))


def by_family(results: Sequence[RowResult]) -> dict[str, Statistics]:
    """Statistics per family, in order of first appearance."""
    errors: dict[str, list[float]] = {}
    for result in results:
        errors.setdefault(result.family, [])
        if result.error is not None:
            errors[result.family].append(result.error)
    return {family: statistics(values) for family, values in errors.items()}


def overall(results: Sequence[RowResult]) -> Statistics:
    """Statistics over all rows, each family with the same total weight."""
    ran = [result for result in results if result.error is not None]
    counts: dict[str, int] = {}
    for result in ran:
        counts[result.family] = counts.get(result.family, 0) + 1
    return statistics(
        [result.error for result in ran if result.error is not None],
        [1.0 / counts[result.family] for result in ran],
    )


#: Parts of the breakdown that explain an error, under the names that people suspect.
CAUSES: dict[str, tuple[str, ...]] = {
    "GEMM": ("gemm",),
    "attention": ("attention",),
    "memory-bound": ("memory_bound",),
    "TP": ("tensor", "context"),
    "EP": ("expert",),
    "DP": ("data",),
    "PP": ("pipeline",),
    "bubble": ("bubble",),
    "optimizer": ("optimizer",),
    "host": ("host",),
    "other": ("other",),
}


def suspected_causes(results: Sequence[RowResult]) -> dict[str, dict[str, float]]:
    """Per family, the signed error that each part of the step is suspected of, as fractions.

    The true time of part c is taken as (1 + x_c) times the simulated one; ridge regression over
    the family's rows finds the x that explain the errors with the least change. A part's entry is
    the error that it makes in the mean row: negative where it is simulated too short. Parts that
    always have the same share cannot be told apart and share the blame.
    """
    ridge = 0.01
    families: dict[str, list[RowResult]] = {}
    for result in results:
        if result.error is not None:
            families.setdefault(result.family, []).append(result)
    causes: dict[str, dict[str, float]] = {}
    for family, rows in families.items():
        shares = np.array(
            [
                [
                    sum(row.breakdown_s.get(part, 0.0) for part in parts) / row.measured_step_time_s
                    for parts in CAUSES.values()
                ]
                for row in rows
            ]
        )
        missing = np.array([-(row.error or 0.0) for row in rows])
        count = shares.shape[1]
        gram = shares.T @ shares + ridge * len(rows) * np.eye(count)
        excess = np.linalg.solve(gram, shares.T @ missing)
        blame = -excess * shares.mean(axis=0)
        causes[family] = {name: float(value) for name, value in zip(CAUSES, blame, strict=True)}
    return causes


def coverage(results: Sequence[RowResult]) -> float:
    """Share of the rows whose measured time lies in the simulated band."""
    ran = [r for r in results if r.low_s is not None and r.high_s is not None]
    inside = sum(
        r.low_s <= r.measured_step_time_s <= r.high_s
        for r in ran
        if r.low_s is not None and r.high_s is not None
    )
    return inside / len(ran) if ran else math.nan


@dataclass(frozen=True)
class Ranking:
    """How well a simulator orders the layouts of one model on one cluster."""

    sweeps: int
    kendall_tau: float
    """Mean over sweeps, of pairs whose measured times differ by more than the noise."""
    regret: float
    """Mean over sweeps of measured(plan ranked first) / measured(best) - 1."""


def ranking(results: Sequence[RowResult], *, noise: float = 0.04) -> Ranking:
    """Ranking within sweeps of at least two layouts; `noise` is relative.

    A layout measured more than once counts with its fastest measurement; a sweep whose layouts are
    all within the noise has no order to find and is left out. Equal simulated times are half right:
    they count in the pairs, neither as concordant nor as discordant (Kendall's tau-a).
    """
    sweeps: dict[str, dict[str, tuple[float, float]]] = {}
    for result in results:
        if result.simulated_step_time_s is None or not result.group:
            continue
        times = (result.measured_step_time_s, result.simulated_step_time_s)
        layouts = sweeps.setdefault(result.group, {})
        layouts[result.layout] = min(times, layouts.get(result.layout, times))
    taus, regrets = [], []
    for layouts in sweeps.values():
        order = pairs = 0
        for (measured, simulated), (other_measured, other_simulated) in itertools.combinations(
            layouts.values(), 2
        ):
            low, high = sorted((measured, other_measured))
            if high / low - 1.0 <= noise:
                continue
            pairs += 1
            order += int(np.sign((measured - other_measured) * (simulated - other_simulated)))
        if not pairs:
            continue
        taus.append(order / pairs)
        chosen, _ = min(layouts.values(), key=lambda times: times[1])
        regrets.append(chosen / min(layouts.values())[0] - 1.0)
    if not taus:
        return Ranking(0, math.nan, math.nan)
    return Ranking(len(taus), float(np.mean(taus)), float(np.mean(regrets)))
