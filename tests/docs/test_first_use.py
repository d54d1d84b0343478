"""What a first user tries: the tutorial's example on every machine, with every framework."""

from __future__ import annotations

import pytest
from pages import ROOT

import simulator
from simulator.catalog.frameworks import frameworks
from simulator.topology import load_cluster, topology_names

FIRST = ROOT / "experiments" / "tutorial_first.yaml"


@pytest.mark.parametrize("name", topology_names())
def test_the_first_example_runs_on_every_topology(name: str) -> None:
    cluster = load_cluster(name, nodes=2)
    precisions = set.intersection(*(set(t.peak_flops) for t in cluster.accelerator_types))
    experiment = simulator.load_experiment(FIRST).replace(
        **{
            "cluster.topology": name,
            "training.precision": "bf16" if "bf16" in precisions else "fp16",
            "training.global_batch_size": len(cluster),
        }
    )
    summary = simulator.run(experiment).summary
    assert summary.accelerators == len(cluster)
    assert 0.0 < summary.mfu < 1.0
    assert sum(summary.breakdown_s.values()) == pytest.approx(summary.step_time_s)


@pytest.mark.parametrize("name", sorted(frameworks()))
def test_the_first_example_runs_with_every_framework(name: str) -> None:
    experiment = simulator.load_experiment(FIRST).replace(framework=name)
    summary = simulator.run(experiment).summary
    assert 0.0 < summary.mfu < 1.0
    assert sum(summary.breakdown_s.values()) == pytest.approx(summary.step_time_s)
