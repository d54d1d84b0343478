"""From an experiment to its result: resolve every size, build the programs, run the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from simulator.catalog.accelerators import Accelerator
from simulator.catalog.frameworks import FrameworkProfile, framework, framework_from_mapping
from simulator.costs.collectives import CollectiveTraffic, collective_traffic
from simulator.costs.expert_exchange import ExpertExchange
from simulator.costs.host_copies import WithHostCopies
from simulator.engine import simulate as simulate_workload
from simulator.engine.core import Engine
from simulator.errors import InputError, gathered, raise_all, unknown_name
from simulator.experiment import Experiment, Parallel, Training, errors_of_file, load_experiment
from simulator.folding import Quotient, fold
from simulator.folding import resolve as resolve_traffic
from simulator.model.context import RECOMPUTE_MODULES, LayerContext
from simulator.model.lookup import resolve_model
from simulator.model.operations import Collective
from simulator.model.spec import LayerId, ModelSpec
from simulator.model.vocabulary import check_vocabulary
from simulator.plan.memory import MemoryReport, memory_report
from simulator.plan.mesh import Mesh
from simulator.plan.placement import torus_placement
from simulator.plan.sharding import sharded_around_passes
from simulator.plan.stages import assign_stages, parse_layout, with_ends
from simulator.programs import Behaviour, Plan, build_workload
from simulator.schedules import Schedule, read_schedule
from simulator.schedules import build as build_schedule
from simulator.schedules.vocabulary import place_vocabulary
from simulator.summary import Summary, summarize
from simulator.timeline import Timeline
from simulator.topology import Cluster, load_cluster
from simulator.workload import Workload, merge

#: Upper bound of micro-batches times stages: a mistyped batch must not fill the memory.
MAX_ACTIONS = 2_000_000


class OutOfMemoryError(InputError):
    """The plan, or that of the further job `job`, does not fit into the accelerators' memory."""

    def __init__(self, report: MemoryReport, job: str = "") -> None:
        self.report = report
        self.job = job
        super().__init__(report.explain(), place=f"job {job!r}: memory" if job else "memory")


@dataclass(frozen=True)
class Result:
    """What one simulated step gives."""

    experiment: Experiment
    plan: Plan
    cluster: Cluster
    workload: Workload
    timeline: Timeline
    memory: MemoryReport
    summary: Summary
    jobs: Mapping[str, Summary] = field(default_factory=dict)
    """Summaries of the experiment's further jobs by name."""

    @property
    def step_time(self) -> float:
        """Seconds of one training step."""
        return self.summary.step_time_s

    def frame(self, ranks: Any = "representatives") -> Any:
        """The timeline as a pandas DataFrame, see `Timeline.frame`."""
        return self.timeline.frame(ranks)

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()


def run(
    experiment: Experiment | str | Path,
    *,
    cluster: Cluster | nx.Graph | None = None,
    allow_oom: bool = True,
) -> Result:
    """Simulate one training step.

    Parameters
    ----------
    experiment:
        An `Experiment`, or the path of an experiment file.
    cluster:
        A cluster that is already built, or a networkx graph of one's own, in place of the
        experiment's topology.
    allow_oom:
        False: raise `OutOfMemoryError` for a plan that does not fit instead of simulating it.

    Raises
    ------
    InputError
        If the experiment contradicts itself or the cluster.
    OutOfMemoryError
        If it or one of its further jobs does not fit and `allow_oom` is False.
    """
    if isinstance(experiment, Experiment):
        experiment = experiment.replace()  # dataclasses built in Python are checked like a file
    elif isinstance(experiment, str | Path):
        path = experiment
        experiment = load_experiment(path)
        with errors_of_file(path):
            return run(experiment, cluster=cluster, allow_oom=allow_oom)
    else:
        raise InputError(
            "expected an Experiment or the path of an experiment file, "
            f"got {type(experiment).__name__}"
        )
    plan, built = resolve(experiment, cluster=cluster)
    memory = plan_memory(plan)
    if not allow_oom:
        reports = {"": memory}
        reports |= {n: plan_memory(p) for n, p in _other_jobs(experiment, built, plan).items()}
        for job, report in reports.items():
            if not report.fits:
                raise OutOfMemoryError(report, job)
    return execute(plan, built, memory=memory)


def execute(
    plan: Plan,
    cluster: Cluster,
    *,
    memory: MemoryReport | None = None,
    quotient: Quotient | None = None,
) -> Result:
    """Simulate one step of a resolved plan, see `resolve`; what `run` does after it.

    Parameters
    ----------
    memory:
        `plan_memory(plan)`, where it is known already.
    quotient:
        `fold_plan(plan, cluster)`, where it is known already; for an experiment without jitter and
        further jobs.

    Raises
    ------
    InputError
        If a further job of the experiment contradicts itself or the cluster.
    """
    experiment = plan.experiment
    memory = plan_memory(plan) if memory is None else memory
    others = _other_jobs(experiment, cluster, plan)
    if quotient is not None:
        if others or experiment.jitter is not None:
            raise ValueError("a quotient describes one job without jitter")
        workload = quotient.system.workload
        timeline = Timeline(quotient, Engine(quotient).execute())
    else:
        workload = build_workload(plan)
        if others:
            first = experiment.job_name
            rest = {n: build_workload(p) for n, p in others.items()}
            workload = merge({first: workload, **rest})
        timeline = simulate_workload(
            workload,
            cluster,
            traffic=traffic_model(plan.model, plan.profile),
            fold=experiment.fold,
            jitter=experiment.jitter,
        )
    summary = summarize(plan, cluster, timeline, memory, ranks=range(plan.mesh.ranks))
    jobs: dict[str, Summary] = {}
    start = plan.mesh.ranks
    for name, other in others.items():
        own = range(start, start + other.mesh.ranks)
        jobs[name] = summarize(other, cluster, timeline, plan_memory(other), ranks=own)
        start += other.mesh.ranks
    return Result(experiment, plan, cluster, workload, timeline, memory, summary, jobs)


def fold_plan(plan: Plan, cluster: Cluster) -> Quotient:
    """The programs of a resolved plan, folded: ranks that behave alike are one class."""
    traffic = traffic_model(plan.model, plan.profile)
    return fold(resolve_traffic(build_workload(plan), cluster, traffic))


def _other_jobs(experiment: Experiment, cluster: Cluster, plan: Plan) -> dict[str, Plan]:
    """Plans of the experiment's further jobs by name; no accelerator may serve two."""
    plans: dict[str, Plan] = {}
    taken = set(plan.placement.tolist())
    for index, job in enumerate(experiment.jobs):
        place = f"jobs.{index}"
        if job.name in plans or job.name == experiment.job_name:
            raise InputError(f"two jobs are called {job.name!r}", place=f"{place}.name")
        shared = taken.intersection(job.placement)
        if shared:
            raise InputError(
                f"accelerator {min(shared)} already serves another job; give the experiment a "
                "`cluster.placement` and each job accelerators of its own",
                place=f"{place}.placement",
            )
        taken.update(job.placement)
        alone = replace(
            experiment,
            name=job.name,
            model=job.model,
            cluster=replace(experiment.cluster, placement=job.placement),
            parallel=job.parallel,
            training=job.training,
            framework=job.framework,
            jobs=(),
        )
        try:
            plans[job.name] = resolve(alone, cluster=cluster)[0]
        except InputError as error:
            raise error.at(place) from None
    return plans


def resolve(
    experiment: Experiment, *, cluster: Cluster | nx.Graph | None = None
) -> tuple[Plan, Cluster]:
    """Every size of the experiment, checked against the cluster; raises `InputError`."""
    place = experiment.name or None
    errors: list[InputError] = []
    with gathered(errors):
        model = resolve_model(experiment.model, place="model")
    with gathered(errors):
        profile = _profile(experiment.framework)
    with gathered(errors):
        built = build_cluster(experiment, cluster)
    raise_all(errors)
    parallel, training = experiment.parallel, experiment.training
    _check_recompute(training)
    mesh = _mesh(parallel, model, len(_placement(experiment, built)))
    placement = _placement(experiment, built)
    if experiment.cluster.placement is None and built.scale_up.kind == "torus":
        shape, size = built.scale_up.shape, built.scale_up.size
        on_torus = torus_placement(mesh, shape, len(placement) // size)
        placement = placement if on_torus is None else on_torus
    microbatches = _microbatches(training, mesh)
    behaviour = _behaviour(parallel, profile)
    profile = replace(profile, tensor_overlap=behaviour.tensor, moe_overlap=behaviour.expert)
    context = _context(
        model, parallel, training, profile, mesh, microbatches, tuple(built.accelerator_types)
    )
    pairs = behaviour.expert and mesh.expert > 1
    schedule = _schedule(parallel, training, microbatches, pairs=pairs)
    vocabulary = None
    if context.vocabulary_ranks > 1:
        _check_vocabulary(model, parallel, profile)
        vocabulary = place_vocabulary(schedule)
        schedule = vocabulary.schedule
    stage_layers = _stage_layers(parallel, model, schedule)
    if any("mtp" in stage and "head" not in stage for stage in stage_layers):
        context = replace(context, mtp_head_with_loss=True)
    types = np.asarray(built.accelerator_type_of)[placement]
    slowdown = np.asarray(built.slowdown, dtype=float)[placement]
    hosts = len(np.unique(np.asarray(built.host_of)[placement]))
    slowdown = slowdown * straggler_pace(hosts / mesh.pipeline, experiment.cluster.variability)
    plan = Plan(
        experiment=experiment,
        model=model,
        profile=profile,
        behaviour=behaviour,
        mesh=mesh,
        context=context,
        schedule=schedule,
        stage_layers=stage_layers,
        vocabulary=vocabulary,
        accelerators=tuple(built.accelerator_types),
        accelerator_of=types,
        placement=placement,
        slowdown=slowdown,
        collective_seconds=_CollectiveSeconds(
            built, mesh, placement, traffic_model(model, profile)
        ),
    )
    _check_precision(plan, place)
    return plan, built


#: Replicas that synchronise their gradients go at the pace of the slowest, and more of them have a
#: slower slowest one (clocks, temperature, operating-system noise, retransmissions). Relative
#: slowdown of the whole per doubling of the number of hosts over which a stage is replicated or
#: sharded (variation along a pipeline averages out over its stages). Informed by whole steps
#: (weak scaling of llm-foundry on H100 and A100, MaxText on v5e, InternEvo on A100: 1-3 % per
#: doubling); see docs/fidelity.md for the errors with each of them left out.
STRAGGLER_PER_DOUBLING = 0.015


def straggler_pace(hosts: float, variability: float | None = None) -> float:
    """Factor >= 1 on everything that `hosts` synchronised hosts compute.

    `variability` replaces `STRAGGLER_PER_DOUBLING`; 0 for ideal machines.
    """
    per_doubling = STRAGGLER_PER_DOUBLING if variability is None else variability
    return 1.0 + per_doubling * math.log2(max(1.0, hosts))


def build_cluster(experiment: Experiment, cluster: Cluster | nx.Graph | None = None) -> Cluster:
    """The experiment's cluster with its faults."""
    if isinstance(cluster, Cluster):
        return cluster
    wanted = experiment.cluster
    if cluster is not None:
        if not isinstance(cluster, nx.Graph):
            raise InputError(
                f"expected a Cluster or a networkx graph, got {type(cluster).__name__}",
                place="cluster",
            )
        return Cluster.from_graph(cluster)
    return load_cluster(
        wanted.topology,
        nodes=wanted.nodes,
        accelerators=wanted.accelerators,
        network=wanted.network,
        fabric_efficiency=wanted.fabric_efficiency,
        faults=wanted.faults,
        place="cluster",
    )


def plan_memory(plan: Plan) -> MemoryReport:
    """Memory per pipeline rank of a resolved plan."""
    return memory_report(
        plan.model,
        plan.context,
        mesh=plan.mesh,
        schedule=plan.schedule,
        stage_layers=plan.stage_layers,
        sharding=plan.sharding,
        optimizer=plan.experiment.training.optimizer,
        capacity=min(
            plan.accelerators[int(i)].memory_bytes for i in np.unique(plan.accelerator_of)
        ),
        context_of=plan.context_of,
        offload=plan.experiment.training.activation_offload,
        offload_layers=plan.experiment.training.activation_offload_layers,
        vocabulary_in_flight=plan.vocabulary.in_flight if plan.vocabulary else None,
    )


# ------------------------------------------------------------------------------- pieces


def _profile(value: str | dict[str, Any] | None) -> FrameworkProfile:
    if isinstance(value, dict):
        return framework_from_mapping(value, place="framework")
    try:
        return framework(value)
    except InputError as error:
        raise error.at("framework") from None


def _placement(experiment: Experiment, cluster: Cluster) -> np.ndarray:
    size = len(cluster.accelerators)
    given = experiment.cluster.placement
    if given is None:
        return np.arange(size, dtype=np.int64)
    if not given:
        raise InputError("names no accelerator", place="cluster.placement")
    if any(not 0 <= index < size for index in given):
        raise InputError(
            f"accelerator indices must lie in 0..{size - 1}", place="cluster.placement"
        )
    placement = np.asarray(given, dtype=np.int64)
    if len(np.unique(placement)) != len(placement):
        raise InputError("an accelerator is named twice", place="cluster.placement")
    return placement


def _mesh(parallel: Parallel, model: ModelSpec, ranks: int) -> Mesh:
    fixed = parallel.tensor * parallel.pipeline * parallel.context
    data = parallel.data
    if data is None:
        if ranks % fixed:
            raise InputError(
                f"tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x "
                f"{parallel.context} = {fixed} does not divide the {ranks} accelerators; "
                f"expected a divisor such as {_nearest_divisor(ranks, fixed)}",
                place="parallel",
            )
        data = ranks // fixed
    elif data * fixed != ranks:
        raise InputError(
            f"data x tensor x pipeline x context = {data * fixed} ranks, but the cluster has "
            f"{ranks} accelerators; data = {max(1, ranks // fixed)} would use "
            f"{max(1, ranks // fixed) * fixed}",
            place="parallel.data",
        )
    errors = []
    if (parallel.expert_tensor or 1) > 1 and not model.moe:
        errors.append(
            InputError(
                f"model {model.name!r} has no experts; expected 1", place="parallel.expert_tensor"
            )
        )
    if parallel.expert > 1 and not model.moe:
        errors.append(
            InputError(f"model {model.name!r} has no experts; expected 1", place="parallel.expert")
        )
    if model.moe and model.n_experts % parallel.expert:
        errors.append(
            InputError(
                f"{parallel.expert} does not divide the {model.n_experts} experts",
                place="parallel.expert",
            )
        )
    raise_all(errors)
    return Mesh(
        tensor=parallel.tensor,
        context=parallel.context,
        data=data,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor or 1,
        shard_group=parallel.shard_group or 0,
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def _microbatches(training: Training, mesh: Mesh) -> int:
    size = training.micro_batch_size * mesh.data
    batch = training.global_batch_size
    if batch is None:
        return 1
    if batch % size:
        below, above = batch // size * size, -(-batch // size) * size
        raise InputError(
            f"{batch} is no multiple of micro_batch_size x data = {training.micro_batch_size} x "
            f"{mesh.data} = {size}; nearest: {below or above}",
            place="training.global_batch_size",
        )
    return batch // size


def _behaviour(parallel: Parallel, profile: FrameworkProfile) -> Behaviour:
    wanted = parallel.overlap

    def pick(value: bool | None, default: bool) -> bool:
        return default if value is None else value

    return Behaviour(
        grad_reduce=pick(wanted.grad_reduce, profile.overlap_grad_reduce),
        param_gather=pick(wanted.param_gather, profile.overlap_param_gather),
        p2p=pick(wanted.p2p, profile.overlap_p2p),
        tensor=pick(wanted.tensor, profile.tensor_overlap),
        expert=pick(wanted.expert, profile.moe_overlap),
    )


def _context(
    model: ModelSpec,
    parallel: Parallel,
    training: Training,
    profile: FrameworkProfile,
    mesh: Mesh,
    microbatches: int,
    chips: tuple[Accelerator, ...],
) -> LayerContext:
    return LayerContext(
        micro_batch=training.micro_batch_size,
        seq=training.sequence_length or model.max_seq,
        tensor=mesh.tensor,
        context=mesh.context,
        context_kind=parallel.context_kind,
        expert=mesh.expert,
        expert_tensor=mesh.expert_tensor,
        sequence_parallel=parallel.sequence_parallel and mesh.tensor > 1,
        precision=training.precision,
        profile=profile,
        recompute=training.recompute,
        recompute_modules=training.recompute_modules or (),
        micro_batches=microbatches,
        shards=_pass_shards(parallel, profile, mesh),
        moe_imbalance=training.expert_imbalance,
        capacity_factor=training.expert_capacity_factor,
        vocabulary_ranks=mesh.pipeline if parallel.vocabulary_parallel else 1,
        scaled_copies=max(chip.constants["fp8_operand_copies"] for chip in chips),
    ).check(model, place="parallel")


def _pass_shards(parallel: Parallel, profile: FrameworkProfile, mesh: Mesh) -> int:
    """Ranks over which parameters are sharded while a pass runs."""
    sharded = sharded_around_passes(parallel.sharding, profile, mesh.pipeline)
    return mesh.shard if sharded else 1


def _schedule(
    parallel: Parallel, training: Training, microbatches: int, *, pairs: bool
) -> Schedule:
    """The schedule; `pairs`: expert exchanges hide behind another micro-batch's passes, for which
    a rank without a pipeline keeps one forward ahead."""
    name, options = parallel.schedule, dict(parallel.schedule_options)
    if name is not None and name.endswith((".csv", ".json")):
        schedule = read_schedule(name, ranks=parallel.pipeline)
        if training.global_batch_size is not None and schedule.microbatches != microbatches:
            raise InputError(
                f"{name} has {schedule.microbatches} micro-batches, global_batch_size "
                f"{training.global_batch_size} makes {microbatches} per replica; expected "
                f"{training.global_batch_size // microbatches * schedule.microbatches}",
                place="training.global_batch_size",
            )
        return schedule
    if training.inference:
        name = "forward-only"
    elif name is None:
        name = "interleaved-1f1b" if parallel.virtual_stages > 1 else "1f1b"
    if pairs and parallel.pipeline == 1 and name == "1f1b":
        options.setdefault("forwards_ahead", 1)
    if microbatches * parallel.pipeline * parallel.virtual_stages > MAX_ACTIONS:
        raise InputError(
            f"{microbatches} micro-batches on {parallel.pipeline * parallel.virtual_stages} stages "
            f"are more than {MAX_ACTIONS} passes",
            place="training.global_batch_size",
        )
    try:
        return build_schedule(
            name,
            parallel.pipeline,
            microbatches,
            parallel.virtual_stages,
            **options,
        )
    except InputError as error:
        raise error.at("parallel.schedule") from None


def _stage_layers(
    parallel: Parallel, model: ModelSpec, schedule: Schedule
) -> tuple[tuple[LayerId, ...], ...]:
    """Layers of every stage of the schedule: blocks, with the embedding first and the head last."""
    virtual = max(1, schedule.parts // parallel.pipeline)
    if parallel.pipeline_layout is not None:
        for name in ("stage_layers", "account_for_embedding", "account_for_loss"):
            if getattr(parallel, name) is not None:
                raise InputError(
                    f"says what every stage holds; expected no `{name}` beside it",
                    place="parallel.pipeline_layout",
                )
        parts = parse_layout(
            parallel.pipeline_layout, model.layers, parallel.pipeline, virtual,
            mtp_layers=model.mtp_layers,
        )  # fmt: skip
        return tuple(parts[part] for part in schedule.stage_layer_part)
    blocks = assign_stages(
        model.layers,
        parallel.pipeline,
        virtual,
        layers_per_stage=parallel.stage_layers,
        count_embedding=parallel.account_for_embedding,
        count_loss=parallel.account_for_loss,
        mtp_layers=model.mtp_layers,
    )
    parts = with_ends(blocks, model.layer_ids)
    return tuple(parts[part] for part in schedule.stage_layer_part)


def _check_vocabulary(model: ModelSpec, parallel: Parallel, profile: FrameworkProfile) -> None:
    """What vocabulary parallelism cannot be combined with."""
    check_vocabulary(model, place="parallel.vocabulary_parallel")
    if sharded_around_passes(parallel.sharding, profile, parallel.pipeline):
        raise InputError(
            f"does not go with parameters sharded around each pass (`sharding: "
            f"{parallel.sharding}`); expected none, zero1 or, not in FSDP, zero2",
            place="parallel.vocabulary_parallel",
        )


def _check_recompute(training: Training) -> None:
    """What to recompute or offload must be given for the mode that uses it."""
    errors = [
        unknown_name(
            "recompute module", name, RECOMPUTE_MODULES, place="training.recompute_modules"
        )
        for name in training.recompute_modules or ()
        if name not in RECOMPUTE_MODULES
    ]
    if training.recompute_modules and training.recompute != "selective":
        errors.append(
            InputError(
                f"needs `recompute: selective`, got {training.recompute!r}",
                place="training.recompute_modules",
            )
        )
    if training.activation_offload_layers is not None and not training.activation_offload:
        errors.append(
            InputError(
                "needs `activation_offload: true`", place="training.activation_offload_layers"
            )
        )
    if training.recompute_layers is not None and training.recompute != "full":
        errors.append(
            InputError(
                f"needs `recompute: full`, got {training.recompute!r}",
                place="training.recompute_layers",
            )
        )
    raise_all(errors)


def _check_precision(plan: Plan, place: str | None) -> None:
    precision = plan.context.precision
    for index in np.unique(plan.accelerator_of):
        accelerator = plan.accelerators[int(index)]
        if precision not in accelerator.peak_flops:
            supported = ", ".join(sorted(accelerator.peak_flops))
            raise InputError(
                f"{accelerator.name} has no {precision} arithmetic (it has: {supported})",
                place="training.precision",
            )


#: (cluster, operation, ranks [G, n], bytes) -> traffic, as `collective_traffic`.
CollectiveTrafficModel = Callable[..., CollectiveTraffic]


def traffic_model(model: ModelSpec, profile: FrameworkProfile) -> CollectiveTrafficModel:
    """What collectives do to links, under the framework's expert dispatcher."""
    if model.moe and profile.moe_dispatcher == "deepep":
        return WithHostCopies(ExpertExchange(model.routing))
    return WithHostCopies(collective_traffic)


class _CollectiveSeconds:
    """Seconds of a collective of the first group of its name when nothing else runs."""

    def __init__(
        self,
        cluster: Cluster,
        mesh: Mesh,
        placement: np.ndarray,
        traffic: CollectiveTrafficModel,
    ) -> None:
        self._cluster, self._mesh, self._placement = cluster, mesh, placement
        self._traffic = traffic
        self._seconds: dict[tuple[str, str, float], float] = {}
        self._members: dict[str, np.ndarray] = {}

    def __call__(self, collective: Collective) -> float:
        key = (collective.op, collective.group, collective.bytes)
        if key not in self._seconds:
            self._seconds[key] = self._measure(collective)
        return self._seconds[key]

    def _measure(self, collective: Collective) -> float:
        group = collective.group
        if group not in self._members:
            labels = self._mesh.group_labels(group)
            self._members[group] = self._placement[np.flatnonzero(labels == labels[0])]
        ranks = self._members[group]
        if len(ranks) < 2:
            return 0.0
        traffic = self._traffic(self._cluster, collective.op, ranks[None, :], collective.bytes)
        return float(traffic.duration(self._cluster)[0])
