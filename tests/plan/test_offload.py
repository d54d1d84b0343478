"""Activation offloading: copies beside the computation, and how much stays on the device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from simulator.costs.host_copies import FROM_HOST, TO_HOST, WithHostCopies
from simulator.costs.kernels import HOST_COPY_LATENCY, host_copy_rate
from simulator.errors import InputError
from simulator.experiment import parse_experiment
from simulator.model.activations import activation_bytes
from simulator.model.spec import LayerId
from simulator.plan.offload import WINDOW, offloaded_layers, peak_on_device, turns_at_once
from simulator.schedules import build
from simulator.simulation import Result, run
from simulator.topology import Cluster, load_cluster

PLAIN: dict[str, Any] = {
    "model": "llama2-7b",
    "cluster": {"topology": "dgx-a100", "accelerators": 1},
    "training": {
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "sequence_length": 2048,
        "activation_offload": True,
    },
}


def step(**changes: Any) -> Result:
    return run(parse_experiment(PLAIN).replace(**changes))


def rows(result: Result, operation: str, rank: int = 0) -> pd.DataFrame:
    frame = result.frame()
    return frame[(frame["operation"] == operation) & (frame["rank"] == rank)]


def stored(result: Result) -> float:
    plan = result.plan
    return activation_bytes(plan.model, 0, plan.context_of(0))


def test_what_turns_at_once() -> None:
    last = build("1f1b", 4, 8).actions[3]
    assert turns_at_once(last) == {(3, m) for m in range(8)}
    assert turns_at_once(build("1f1b", 4, 8).actions[0]) == frozenset()
    assert turns_at_once(build("zb-h1", 4, 8).actions[3]) == frozenset()  # W comes later
    layers = ("embedding", 0, 1, 2, 3, "head")
    assert offloaded_layers(layers, at_once=False) == (0, 1, 2, 3)
    assert offloaded_layers(layers, at_once=True) == (0, 1)


def test_every_layer_leaves_and_returns_once_per_microbatch() -> None:
    result = step()
    layers, size = result.plan.model.layers - WINDOW, stored(result)
    for name in ("activations.offload", "activations.reload"):
        copies = rows(result, name)
        assert len(copies) == 2 * layers
        assert (copies["kind"] == "host_copy").all()
        assert copies["bytes"].sum() == pytest.approx(2 * layers * size)
        assert copies["stream"].nunique() == 1
    assert result.timeline.link_bytes()[result.cluster.host_link_in[0]] >= 2 * layers * size


def test_order_of_copies_and_passes() -> None:
    frame = step().frame()
    first = frame[frame["microbatch"] == 0]
    compute = first[(first["stream"] == "compute") & (first["layer"] >= 0)]
    forward = compute[compute["phase"] == "F"].groupby("layer")
    backward = compute[compute["phase"] != "F"].groupby("layer")
    away = first[first["operation"] == "activations.offload"].set_index("layer")
    back = first[first["operation"] == "activations.reload"].set_index("layer")
    ran = forward["end"].max()
    assert (away["start"] >= ran[away.index] - 1e-12).all()
    assert (back["start"] >= away["end"][back.index] - 1e-12).all()
    assert (backward["start"].min()[back.index] >= back["end"] - 1e-12).all()


@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe", "interleaved-1f1b"])
def test_memory_stays_within_the_report(schedule: str, limit: int | None) -> None:
    """Activations on the device, taken from the timeline: from the start of a layer's forward to
    the end of its copy, and from the start of its fetch to the end of its last backward."""
    changes: dict[str, Any] = {
        "cluster.accelerators": 4,
        "parallel.pipeline": 4,
        "parallel.schedule": schedule,
        "training.global_batch_size": 4,
        "training.activation_offload_layers": limit,
    }
    if schedule == "interleaved-1f1b":
        changes["parallel.virtual_stages"] = 2
    result = step(**changes)
    frame, size = result.frame(), stored(result)
    for rank in range(4):
        own = frame[(frame["rank"] == rank) & (frame["layer"] >= 0)]
        moments: list[tuple[float, float]] = []
        for _, part in own.groupby(["layer", "microbatch"]):
            kind = part["operation"]
            compute = part[part["stream"] == "compute"]
            begun = compute["start"].min()
            split = (compute["phase"] == "W") if schedule == "zb-h1" else compute["phase"] == ""
            left = part.loc[kind == "activations.offload", "end"]
            gone = left.iloc[0] if len(left) else compute["end"].max()
            moments += [(begun, size), (gone, -size)]
            fetched = part[kind == "activations.reload"]
            for _, fetch in fetched.iterrows():
                uses = compute[(compute["phase"] != "F") & (compute["start"] >= fetch["end"])]
                uses = (
                    uses[split[uses.index]] if fetch["phase"] == "W" else uses[~split[uses.index]]
                )
                moments += [(fetch["start"], size), (uses["end"].max(), -size)]
        moments.sort(key=lambda m: (round(m[0], 12), m[1]))
        held = np.cumsum([change for _, change in moments]).max()
        assert held <= result.memory.stages[rank].activations * (1 + 1e-9)
        if limit is None:
            assert held <= 2 * WINDOW * size * (1 + 1e-9)


def test_hidden_where_the_link_is_fast_enough() -> None:
    """Full recomputation stores 2sbh per layer, which PCIe moves in a tenth of a layer's time."""
    small = {"training.recompute": "full"}
    plain, away = step(**small, **{"training.activation_offload": False}), step(**small)
    assert away.step_time == pytest.approx(plain.step_time, rel=2e-3)
    assert away.memory.peak < plain.memory.peak


def test_some_layers_leave_over_the_whole_pass() -> None:
    """A quarter of the layers offloaded: their copies have four layers' time each."""
    slow = {"cluster.faults": [{"link": ["node0/gpu0", "node0/pcie0"], "bandwidth_factor": 0.6}]}
    quarter = step(**slow, **{"training.activation_offload_layers": 8})
    plain = step(**slow, **{"training.activation_offload": False})
    every = step(**slow)
    assert len(rows(quarter, "activations.offload")) == 2 * 8
    assert quarter.step_time == pytest.approx(plain.step_time, rel=5e-3)
    assert every.step_time > 1.5 * plain.step_time
    size = stored(plain)
    saved = plain.memory.peak - quarter.memory.peak
    assert saved == pytest.approx((8 - WINDOW) * size)
    assert plain.memory.peak - every.memory.peak == pytest.approx((32 - 2 * WINDOW) * size)


@pytest.mark.parametrize("layers", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_room_of_a_single_stage(layers: int, microbatches: int) -> None:
    """What stays, and the window that is leaving or back already; the last window never leaves."""
    actions = build("1f1b", 1, microbatches).actions[0]
    stage = {0: ("embedding", *range(layers), "head")}
    sizes: dict[LayerId, float] = {"embedding": 3.0, "head": 5.0}
    plain = 3.0 + layers + 5.0
    for limit in range(1, layers + 1):
        away = max(0, min(limit, layers - WINDOW))
        saved = plain - peak_on_device(actions, stage, lambda x: sizes.get(x, 1.0), limit)
        assert saved == pytest.approx(max(0, away - WINDOW))


@pytest.mark.parametrize(
    "schedule, virtual",
    [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved-1f1b", 2), ("dualpipe-v", 2)],
)
def test_more_layers_never_need_more_room(schedule: str, virtual: int) -> None:
    built = build(schedule, 4, 8, virtual)
    for rank, actions in enumerate(built.actions):
        stages = {
            stage: tuple(range(6 * stage, 6 * stage + 6 - stage % 2))  # not all the same
            for stage, on in enumerate(built.stage_to_rank)
            if on == rank
        }
        most = [peak_on_device(actions, stages, lambda _: 1.0, limit) for limit in range(1, 7)]
        assert all(b <= a for a, b in pairwise(most))
        assert most[-1] == peak_on_device(actions, stages, lambda _: 1.0)
        if virtual == 1 and schedule == "1f1b":
            assert most[0] <= (4 - rank) * sum(map(len, stages.values()))  # all in flight
            assert most[-1] <= 2 * WINDOW


@pytest.mark.parametrize("limit", [1, 4, 8, 20, 32])
def test_report_is_what_the_timeline_holds(limit: int) -> None:
    """At the end of the forward: fetches of the first window follow at once, the rest wait."""
    # full recomputation: little to copy, no stalls
    changes = {"training.recompute": "full", "training.global_batch_size": 1}
    result = step(**changes, **{"training.activation_offload_layers": limit})
    plain = step(**changes, **{"training.activation_offload": False})
    frame, layers = result.frame(), result.plan.model.layers
    compute = frame[frame["stream"] == "compute"]
    end = compute.loc[compute["phase"] == "I", "start"].min()  # the head's backward begins
    left, back = (rows(result, f"activations.{name}") for name in ("offload", "reload"))
    assert len(left) == len(back) == min(limit, layers - WINDOW)
    fetched = int((back["start"] <= end).sum())
    assert (left["end"] <= end).all()
    saved = plain.memory.stages[0].activations - result.memory.stages[0].activations
    assert saved == pytest.approx((len(left) - fetched) * stored(plain))


def test_more_layers_than_a_stage_has() -> None:
    pipeline = {"cluster.accelerators": 4, "parallel.pipeline": 4}
    uneven = {**pipeline, "parallel.stage_layers": [7, 9, 9, 7]}
    assert step(**uneven, **{"training.activation_offload_layers": 9}).memory.peak == (
        step(**uneven).memory.peak
    )
    for changes, most in (({}, 32), (pipeline, 8), (uneven, 9)):
        with pytest.raises(InputError, match=f"at most {most}, the layers of the largest") as error:
            step(**changes, **{"training.activation_offload_layers": most + 1})
        assert error.value.place == "training.activation_offload_layers"


def test_layers_need_offloading() -> None:
    wrong = {"training.activation_offload": False, "training.activation_offload_layers": 2}
    with pytest.raises(InputError, match="needs `activation_offload: true`"):
        step(**wrong)


def test_stalls_where_the_link_is_too_slow() -> None:
    """The link is the bottleneck: the forwards take as long as the copies out, the backwards at
    least as long as the copies back."""
    slow = {"cluster.faults": [{"link": ["node0/gpu0", "node0/pcie0"], "bandwidth_factor": 0.2}]}
    result = step(**slow)
    seconds = stored(result) / (0.2 * 26e9)
    count = 2 * (result.plan.model.layers - WINDOW)
    away = rows(result, "activations.offload")
    lasts = away["end"] - away["start"]
    assert lasts.to_numpy() == pytest.approx(seconds + HOST_COPY_LATENCY, rel=1e-6)
    assert result.step_time > 2 * count * seconds * 0.99
    assert result.summary.breakdown_s["host_copy"] > 0.5 * result.step_time
    plain = step(**slow, **{"training.activation_offload": False})
    # copies out and forwards overlap, copies back and backwards too: no more than the sum
    assert result.step_time < plain.step_time + 2 * count * seconds + 1e-3
    assert sum(result.summary.breakdown_s.values()) == pytest.approx(result.step_time)


def test_copies_under_a_bubble_are_no_stalls() -> None:
    """A pipeline idles as long with hidden copies as without, and that is what it is told as."""
    changes = {
        "cluster.accelerators": 4, "parallel.pipeline": 4, "training.recompute": "full",
        "training.global_batch_size": 4,
    }  # fmt: skip
    away, plain = step(**changes), step(**changes, **{"training.activation_offload": False})
    assert away.step_time == pytest.approx(plain.step_time, rel=2e-3)
    assert away.summary.breakdown_s.get("host_copy", 0.0) < 1e-3 * away.step_time
    bubbles = [result.summary.breakdown_s["bubble"] for result in (away, plain)]
    assert bubbles[0] == pytest.approx(bubbles[1], rel=1e-2)
    # though copies do run while nothing is computed
    assert away.timeline.exposed_communication(0, by="group")["host"] > 0.0


def test_neighbours_behind_a_pcie_switch_share_its_link() -> None:
    one = step()
    two = step(**{"cluster.accelerators": 2, "parallel.data": 2, "training.global_batch_size": 4})
    alone, shared = (
        (copies["end"] - copies["start"]).max()
        for copies in (rows(r, "activations.offload") for r in (one, two))
    )
    assert shared - HOST_COPY_LATENCY == pytest.approx(2 * (alone - HOST_COPY_LATENCY), rel=1e-6)
    unfolded = run(two.experiment.replace(fold=False))
    assert unfolded.step_time == pytest.approx(two.step_time, rel=1e-9)


def test_only_training_copies() -> None:
    still = step(**{"training.inference": True})
    assert "host_copy" not in still.summary.breakdown_s
    assert not len(rows(still, "activations.offload"))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.sharding": "zero3", "framework": "torchtitan"},
        {"parallel.sharding": "zero1"},
        {"parallel.tensor": 2, "parallel.sequence_parallel": True},
    ],
)
def test_with_every_kind_of_pass(changes: dict[str, Any]) -> None:
    cluster = {"cluster.accelerators": 4, "training.global_batch_size": 8}
    away = step(**cluster, **changes)
    plain = step(**cluster, **changes, **{"training.activation_offload": False})
    assert away.memory.peak < plain.memory.peak
    assert away.step_time >= plain.step_time * (1 - 1e-9)
    executed = [result.timeline.flops(0) for result in (away, plain)]
    assert executed[0] == pytest.approx(executed[1])


def test_beside_overlapped_expert_exchanges() -> None:
    experiment = {
        "model": "mixtral-8x7b",
        "cluster": {"topology": "dgx-h100", "nodes": 2},
        "parallel": {"pipeline": 2, "expert": 8, "schedule": "dualpipe-v",
                     "virtual_stages": 2, "overlap": {"expert": True}},
        "training": {"global_batch_size": 64, "sequence_length": 2048},
    }  # fmt: skip
    plain = run(parse_experiment(experiment))
    away = run(plain.experiment.replace(**{"training.activation_offload": True}))
    assert away.timeline.flops(0) == pytest.approx(plain.timeline.flops(0))
    assert away.memory.peak < plain.memory.peak
    assert away.step_time > plain.step_time


# ------------------------------------------------------------------------ links to the host


def traffic(cluster: Cluster, op: str, ranks: list[int], nbytes: float) -> Any:
    def refuse(*_: object, **__: object) -> Any:
        raise AssertionError

    return WithHostCopies(refuse)(cluster, op, np.array(ranks)[:, None], nbytes)


def test_rate_of_a_copy() -> None:
    cluster = load_cluster("dgx-a100", nodes=1)
    chip = cluster.accelerator_types[0]
    one = traffic(cluster, TO_HOST, [3], 1e9)
    assert one.duration(cluster)[0] == pytest.approx(1e9 / host_copy_rate(chip) + HOST_COPY_LATENCY)
    assert one.hbm_bytes == 1e9
    assert one.sm_fraction == 0.0
    names = sorted(cluster.link_ends(link) for link in one.link.tolist())
    assert names == [("node0/gpu3", "node0/pcie1"), ("node0/pcie1", "node0/host")]


def test_the_graph_gives_the_same_paths() -> None:
    built = load_cluster("dgx2-v100", nodes=2)
    again = load_cluster(built.graph.copy())
    for op in (TO_HOST, FROM_HOST):
        for rank in (0, 5, 31):
            names = [
                [cluster.link_ends(link) for link in traffic(cluster, op, [rank], 1e6).link]
                for cluster in (built, again)
            ]
            assert sorted(names[0]) == sorted(names[1])
            assert len(names[0]) == 2


def test_without_host_links_the_catalogue_says_how_fast() -> None:
    import networkx as nx

    graph = nx.Graph()
    for i in range(2):
        graph.add_node(f"gpu{i}", type="gpu", accelerator="A100-80GB-SXM", node=0)
    graph.add_edge("gpu0", "gpu1", link="NVLink", bandwidth=300e9, latency=1e-6)
    cluster = load_cluster(graph)
    copy = traffic(cluster, TO_HOST, [1], 1e9)
    assert not copy.link.size
    rate = host_copy_rate(cluster.accelerator_types[0])
    assert copy.duration(cluster)[0] == pytest.approx(1e9 / rate + HOST_COPY_LATENCY)


def test_plain_networks_too() -> None:
    spec = {"family": "mlp", "dense_sizes": [4096] * 9, "activation": "relu"}
    result = step(model=spec)
    assert len(rows(result, "activations.offload")) == 2 * (8 - WINDOW)
