"""Values that no machine or model can have are refused where they stand, before anything runs."""

import networkx as nx
import pytest

import simulator
from simulator.catalog.frameworks import framework_from_mapping
from simulator.engine.jitter import Factors
from simulator.errors import InputError
from simulator.experiment import (
    Cluster,
    Experiment,
    Fault,
    Jitter,
    Parallel,
    Training,
    parse_experiment,
)
from simulator.schedules import build

BASE = {
    "model": "mixtral-8x7b",
    "cluster": {"topology": "dgx-h100", "nodes": 2},
    "parallel": {"tensor": 2, "pipeline": 2, "expert": 4},
    "training": {"global_batch_size": 16},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("cluster.fabric_efficiency", x) for x in (0.0, -1.0, 2.0, float("nan"))),
        *(("cluster.variability", x) for x in (-0.01, float("nan"), float("inf"), 1e300)),
        *(("training.expert_imbalance", x) for x in (0.0, -1.0, 0.99, float("nan"), 1e300)),
        *(("training.expert_capacity_factor", x) for x in (0.0, -1.0, float("inf"))),
        *(("jitter", {"scale": x}) for x in (-1.0, float("inf"), float("nan"), 1e300)),
        *(("cluster.faults", [{"gpu": 0, "slowdown": x}]) for x in (0.5, 1e300, float("nan"))),
        *(("cluster.network", x) for x in (0, "0 Gb/s", 400, "400 b/s", "400 GB", "-1 Gb/s")),
        *(
            ("framework", {"base": "megatron-core", name: x})
            for name, x in (
                ("host_time_per_kernel", -1.0),
                ("host_time_per_kernel", float("nan")),
                ("bucket_elements", 0),
                ("grad_reduce_bytes", 0.0),
                ("fsdp_prefetch", -1),
                ("moe_dispatcher", "all2all"),
                ("fp8_recipe", "delay"),
            )
        ),
        ("cluster.placement", []),
        ("training.recompute_layers", -1),
        ("model", {"layers": 4, "hidden": 65, "heads": 4, "vocab": 100}),
    ],
)
def test_impossible_values_are_refused_with_their_place(key, value):
    with pytest.raises(InputError, match=key):
        simulator.run(parse_experiment(BASE).replace(**{key: value}))


@pytest.mark.parametrize(
    "parts",
    [
        {"parallel": Parallel(tensor=-1)},
        {"parallel": Parallel(tensor="two")},
        {"training": Training(precision="fp9")},
        {"cluster": Cluster("dgx-h100", nodes=2, variability=-1.0)},
        {"cluster": Cluster("dgx-h100", nodes=2, faults=(Fault(gpu=0, slowdown=0.1),))},
        {"cluster": "dgx-h100"},
        {"jitter": Jitter(scale=float("nan"))},
    ],
)
def test_dataclasses_built_in_python_are_checked_like_a_file(parts):
    given = {"model": "llama3-8b", "cluster": Cluster("dgx-h100", nodes=2), **parts}
    with pytest.raises(InputError, match=next(iter(parts))):
        simulator.run(Experiment(**given))


@pytest.mark.parametrize("wrong", [None, 5, {"model": "gpt3-175b"}])
def test_what_is_no_experiment_and_no_path(wrong):
    with pytest.raises(InputError, match="expected an Experiment or the path"):
        simulator.run(wrong)


@pytest.mark.parametrize("wrong", ["dgx-h100", 5, [1]])
def test_what_is_no_graph(wrong):
    with pytest.raises(InputError, match="expected a Cluster or a networkx graph"):
        simulator.run(parse_experiment(BASE), cluster=wrong)
    assert not isinstance(wrong, nx.Graph)


def test_a_schedule_file_whose_micro_batches_contradict_the_batch(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    experiment = parse_experiment(
        {
            "model": {"layers": 2, "hidden": 64, "heads": 4, "vocab": 100, "max_seq": 128},
            "cluster": {"topology": "dgx-h100", "nodes": 1},
            "parallel": {"pipeline": 2, "schedule": str(path)},
            "training": {"global_batch_size": 16},
        }
    )
    with pytest.raises(InputError, match=r"has 2 micro-batches.* makes 4 .*expected 8"):
        simulator.run(experiment)
    tokens = [
        simulator.run(experiment.replace(**{"training.global_batch_size": size})).summary
        for size in (8, None)
    ]
    assert tokens[0].tokens_per_step == tokens[1].tokens_per_step == 8 * 128
    assert tokens[0].step_time_s == tokens[1].step_time_s


def test_a_small_time_as_yaml_reads_it():
    """YAML 1.1 takes `1e-6` for text."""
    given = {"base": "megatron-core", "host_time_per_kernel": "1e-6"}
    assert framework_from_mapping(given).host_time_per_kernel == 1e-6


def test_a_schedule_of_endless_length_is_refused():
    with pytest.raises(InputError, match="more than 10000000 passes"):
        build("1f1b", 100_000_000, 100_000_000)


@pytest.mark.parametrize("scale", [0.02, 0.5, 2.0])
def test_normal_jitter_cut_off_at_zero_keeps_its_mean(scale):
    factors = Factors(Jitter(distribution="normal", scale=scale)).factors(1, 2, 3, 200_000)
    assert factors.min() >= 0.0
    assert factors.mean() == pytest.approx(1.0, abs=5.0 * scale / 200_000**0.5)
