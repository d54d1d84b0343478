"""Everything that reads a file, with valid files to break."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .harness import Reader

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "importers" / "data"

SMALL_MODEL = {
    "name": "small", "family": "gpt", "layers": 4, "hidden": 256, "heads": 4, "vocab": 1000,
    "max_seq": 128,
}  # fmt: skip

EXPERIMENTS: tuple[dict[str, Any], ...] = (
    {
        "model": "gpt3-175b",
        "cluster": {"topology": "dgx-a100", "nodes": 8},
        "parallel": {"tensor": 8, "pipeline": 8, "overlap": {"p2p": True}},
        "training": {"global_batch_size": 64, "micro_batch_size": 1, "recompute": "full"},
    },
    {
        "model": SMALL_MODEL,
        "cluster": {
            "topology": "dgx-h100", "nodes": 2, "network": "400 Gb/s",
            "faults": [{"gpu": 3, "slowdown": 1.5}],
        },
        "parallel": {
            "tensor": 2, "pipeline": 2, "virtual_stages": 2, "sequence_parallel": True,
            "sharding": "zero1", "schedule": "interleaved-1f1b",
        },
        "training": {"global_batch_size": 32, "sequence_length": 128, "precision": "fp8"},
        "framework": {"base": "megatron-core", "cuda_graphs": True},
        "jitter": {"scale": 0.01, "seed": 3},
        "name": "second",
    },
    {
        "model": {"family": "mlp", "dense_sizes": [64, 64, 64]},
        "cluster": {
            "topology": "dgx-h100", "accelerators": 8, "placement": [7, 6, 5, 4, 3, 2, 1, 0],
        },
        "training": {"optimizer": "sgd"},
    },
)  # fmt: skip

RUNS: tuple[dict[str, Any], ...] = (
    EXPERIMENTS[2],
    {**EXPERIMENTS[1], "jitter": None, "training": {"global_batch_size": 16}},
)

CONFIGS: tuple[dict[str, Any], ...] = (
    {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
        "hidden_act": "silu", "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    },
    {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
     "vocab_size": 50257},
    {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "sliding_window": 4096,
    },
    {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
     "num_hidden_layers": 12, "vocab_size": 30522, "type_vocab_size": 2,
     "max_position_embeddings": 512},
    {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6,
     "num_decoder_layers": 6, "vocab_size": 32128, "relative_attention_num_buckets": 32},
    {"model_type": "vit", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
     "num_hidden_layers": 12, "image_size": 224, "patch_size": 16, "num_channels": 3},
)  # fmt: skip

TRACED = {
    "family": "traced", "name": "tiny", "batch": 2, "sequence": 1, "element_bytes": 4.0,
    "layers": [
        {
            "name": "model", "role": "block", "repeat": 3, "parameters": 9, "output_bytes": 8.0,
            "stored_bytes": 64.0, "forward_flops": 32.0, "backward_flops": 64.0,
            "forward": [
                {"type": "gemm", "name": "mm", "m": 2, "n": 1, "k": 8, "per_sample": {"m": 1.0}},
                {"type": "memory_bound", "name": "add", "op_class": "elementwise",
                 "bytes_read": 16.0, "bytes_written": 8.0, "per_sample": {"bytes_read": 8.0}},
                {"type": "attention", "name": "core", "batch": 2, "heads": 2, "kv_heads": 1,
                 "q_len": 4, "kv_len": 4, "qk_dim": 8, "v_dim": 8, "causal": True},
            ],
            "backward": [{"type": "gemm", "name": "mm", "m": 1, "n": 8, "k": 2, "phase": "W"}],
        }
    ],
}  # fmt: skip

SWEEP = {
    "base": EXPERIMENTS[1],
    "sweep": {
        "parallel.tensor": [1, 2, 4],
        "training.micro_batch_size": [1, 2],
    },
    "filter": ["tensor * pipeline <= 64"],
}

ACCELERATOR = {
    "name": "mine", "base": "H100", "memory": "96 GiB", "memory_bandwidth": "4 TB/s",
    "peak_flops": {"bf16": "1000 TFLOP/s"}, "price_usd_per_hour": 2.5,
}  # fmt: skip


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()


def _head(path: Path, lines: int) -> bytes:
    return b"".join(path.read_bytes().splitlines(keepends=True)[:lines])


def kineto_document() -> dict[str, Any]:
    """A short profiler trace with kernels, collectives, launches and stream waits."""
    events: list[dict[str, Any]] = []
    for i in range(4):
        ts = 1000.0 + 400 * i
        events += [
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts - 5, "dur": 1,
             "args": {"correlation": 2 * i}},
            {"ph": "X", "cat": "kernel", "name": "sm90_xmma_gemm", "ts": ts, "dur": 200,
             "args": {"stream": 7, "correlation": 2 * i, "External id": i, "device": 0}},
            {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": ts - 6, "dur": 1,
             "args": {"External id": i, "Input Dims": [[64, 32], [32, 16]]}},
            {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_AllReduce", "ts": ts + 201,
             "dur": 90,
             "args": {"stream": 20, "correlation": 2 * i + 1, "Collective name": "allreduce",
                      "In msg nelems": 4096, "Out msg nelems": 4096, "Group size": 8,
                      "dtype": "BFloat16", "Process Group Name": "0",
                      "Process Group Ranks": "[0, 1, 2, 3, 4, 5, 6, 7]"}},
            {"ph": "X", "cat": "cuda_sync", "name": "Stream Wait Event", "ts": ts + 250, "dur": 0,
             "args": {"stream": 7, "wait_on_stream": 20, "correlation": 100 + i,
                      "wait_on_cuda_event_record_corr_id": 50 + i}},
        ]  # fmt: skip
    events.append({"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 900,
                   "dur": 2000, "args": {}})  # fmt: skip
    config = [{"pg_name": "0", "pg_desc": "default_pg", "pg_size": 8, "ranks": list(range(8))}]
    return {
        "distributedInfo": {"rank": 0, "world_size": 8, "pg_config": config},
        "traceEvents": events,
    }


# ------------------------------------------------------------------------------ reading


def _experiment(path: Path) -> object:
    from simulator.experiment import load_experiment
    from simulator.simulation import plan_memory, resolve

    plan, _ = resolve(load_experiment(path))
    return plan_memory(plan)


def _run(path: Path) -> object:
    """As `simulator run` does, on files whose jobs are small."""
    from simulator.errors import InputError
    from simulator.experiment import load_experiment
    from simulator.simulation import resolve, run

    experiment = load_experiment(path)
    plan, _ = resolve(experiment)
    work = plan.microbatches * (plan.model.layers + 1) * plan.mesh.pipeline
    if work > 2_000 or len(plan.placement) > 64 or not experiment.fold or experiment.jitter:
        raise InputError("too large for fuzzing")  # resolved without a fault, which is the point
    return run(experiment).summary.to_json()


def _config(path: Path) -> object:
    from simulator.model.lookup import resolve_model

    return resolve_model(str(path)).parameters


def _published(path: Path) -> object:
    from simulator.errors import InputError
    from simulator.studies.validation import experiment_from_row, read_rows

    rows = read_rows(path, everything=True)
    for row in rows[:3]:
        try:
            experiment_from_row(row)
        except InputError:
            if row is rows[-1]:
                raise
    return rows


def _kernels(path: Path) -> object:
    from simulator.studies.kernel_validation import read_measurements

    return read_measurements(path)


def _schedule(path: Path) -> object:
    from simulator.schedules import read_schedule

    return read_schedule(path)


def _cluster(path: Path) -> object:
    from simulator.topology import load_cluster

    return load_cluster(str(path)).link_capacity.sum()


def _xml(path: Path) -> object:
    from simulator.importers import read_nccl_xml
    from simulator.topology import Cluster

    return Cluster.from_graph(read_nccl_xml(path))


def _graphml(path: Path) -> object:
    from simulator.importers import read_graphml
    from simulator.topology import Cluster

    return Cluster.from_graph(read_graphml(path))


def _matrix(path: Path) -> object:
    from simulator.importers import read_topo_matrix
    from simulator.topology import Cluster

    chip = "H100" if b"NV18" in path.read_bytes() else "V100"
    return Cluster.from_graph(read_topo_matrix(path, accelerator=chip, network=12.5e9))


def _kineto(path: Path) -> object:
    from simulator.importers import read_kineto

    trace = read_kineto(path)
    trace.frame()
    if trace.world_size <= 64:
        trace.workload()
    return trace


def _chakra(path: Path) -> object:
    from simulator.importers import read_chakra

    trace = read_chakra(path)
    trace.frame()
    if trace.world_size == len(trace.operations):
        trace.workload()
    return trace


def _traced(path: Path) -> object:
    from simulator.model.lookup import resolve_model

    return resolve_model(str(path)).parameters


def _sweep(path: Path) -> object:
    from simulator.studies.sweep_file import load_sweep

    return load_sweep(path)


def _accelerator(path: Path) -> object:
    from simulator.catalog.accelerators import accelerator_from_file

    return accelerator_from_file(path)


def _baseline(path: Path) -> object:
    from simulator.testing.baseline import Baseline

    return Baseline.read(path)


def _texts(path: Path) -> object:
    """Texts of the command line, one a line: quantities, filters, durations, sizes."""
    from simulator.cli.collective import parse_sizes
    from simulator.cli.schedule import parse_durations
    from simulator.errors import InputError
    from simulator.studies.expressions import Filter
    from simulator.units import parse_bandwidth, parse_bytes, parse_flops, parse_time

    parsers: tuple[Callable[[str], object], ...] = (
        parse_bytes, parse_bandwidth, parse_flops, parse_time, Filter.parse, parse_durations,
        parse_sizes,
    )  # fmt: skip
    failed: InputError | None = None
    for line in path.read_bytes().decode("utf-8", errors="replace").splitlines()[:20]:
        for parse in parsers:
            try:
                parse(line)
            except InputError as error:
                failed = error
    if failed is not None:
        raise failed
    return None


def readers() -> list[Reader]:
    """All readers whose optional packages are installed."""
    published = ROOT / "simulator" / "catalog" / "published_steps.csv"
    measured = ROOT / "simulator" / "catalog" / "measurements"
    graph = _graph_seed()
    schedules_csv, schedules_json = _schedule_seeds()
    topologies = [
        p.read_bytes() for p in sorted((ROOT / "topologies").glob("*.yaml"))
        if p.stem in ("dgx-h100", "dgx1-v100", "tpu-v4", "gb200-nvl72", "h100-roce")
    ]  # fmt: skip
    found = [
        Reader("experiment", "yaml", ".yaml", [_yaml(e) for e in EXPERIMENTS], _experiment, 3),
        Reader("run", "yaml", ".yaml", [_yaml(e) for e in RUNS], _run, 1),
        Reader("hf-config", "json", ".json", [_json(c) for c in CONFIGS], _config, 3),
        Reader("published-csv", "text", ".csv", [_head(published, 4)], _published, 2),
        Reader("kernel-csv", "text", ".csv",
               [_head(p, 6) for p in sorted(measured.glob("*.csv"))[:6]], _kernels, 1),
        Reader("schedule-csv", "text", ".csv", schedules_csv, _schedule, 2),
        Reader("schedule-json", "json", ".json", schedules_json, _schedule, 2),
        Reader("topology", "yaml", ".yaml", topologies, _cluster, 3),
        Reader("nccl-xml", "text", ".xml", [(DATA / "hgx_a100_nccl.xml").read_bytes()], _xml, 3),
        Reader("graphml", "text", ".graphml", [graph], _graphml, 3),
        Reader("graphml-topology", "text", ".graphml", [graph], _cluster, 2),
        Reader("topo-matrix", "text", ".txt",
               [p.read_bytes() for p in sorted(DATA.glob("*_topo.txt"))], _matrix, 2),
        Reader("kineto", "json", ".json", [_json(kineto_document())], _kineto, 3),
        Reader("traced-model", "yaml", ".yaml", [_yaml(TRACED)], _traced, 2),
        Reader("sweep", "yaml", ".yaml", [_yaml(SWEEP)], _sweep, 2),
        Reader("baseline", "yaml", ".yaml", [_baseline_seed()], _baseline, 1),
        Reader("accelerator", "yaml", ".yaml", [_yaml(ACCELERATOR)], _accelerator, 1),
        Reader("texts", "text", ".txt",
               [b"80 GiB\n400 Gb/s\ntensor * pipeline <= 64\nF=1,B=2,comm=0\n1KiB:1GiB\n2 us\n"],
               _texts, 1),
    ]  # fmt: skip
    if importlib.util.find_spec("google.protobuf") is not None:
        found.append(Reader("chakra", "binary", ".et", [_chakra_seed()], _chakra, 3))
    return found


def _baseline_seed() -> bytes:
    from simulator.experiment import parse_experiment
    from simulator.simulation import run
    from simulator.testing.baseline import Baseline

    return Baseline.of(run(parse_experiment(RUNS[0]))).to_yaml().encode()


def _graph_seed() -> bytes:
    import tempfile

    import networkx as nx

    from simulator.importers import write_graphml

    graph = nx.Graph(name="two")
    for i in range(4):
        graph.add_node(f"gpu{i}", type="gpu", accelerator="H100", node=str(i // 2))
        graph.add_edge(f"gpu{i}", f"nvswitch{i // 2}", bandwidth=450e9, link="NVLink")
        graph.add_edge(f"gpu{i}", "leaf", bandwidth="400 Gb/s", link="InfiniBand", latency=1e-6)
    graph.nodes["nvswitch0"]["type"] = graph.nodes["nvswitch1"]["type"] = "nvswitch"
    graph.nodes["leaf"]["type"] = "leaf"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.graphml"
        write_graphml(graph, path)
        return path.read_bytes()


def _schedule_seeds() -> tuple[list[bytes], list[bytes]]:
    import tempfile

    from simulator.schedules import build
    from simulator.schedules.files import write_csv

    texts, documents = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, virtual in (("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1)):
            path = Path(folder) / "schedule.csv"
            write_csv(build(name, 2, 4, virtual), path)
            texts.append(path.read_bytes())
            rows = [line.split(",") for line in texts[-1].decode().splitlines() if line]
            documents.append(_json({"microbatches": 4, "actions": rows}))
    return texts, documents


def _chakra_seed() -> bytes:
    from simulator.importers import Trace, TraceOperation
    from simulator.importers.chakra import encode_rank

    operations = (
        TraceOperation("gemm", "compute", "gemm", 0.0, 1e-3, flops=1e9, bytes=1e6),
        TraceOperation("reduce", "data", "all_reduce", 1e-3, 2e-3, bytes=1e6, waits=(0,),
                       collective="all_reduce", group="data/0", match="reduce"),
        TraceOperation("update", "compute", "optimizer", 2e-3, 3e-3, bytes=1e6, waits=(1,)),
    )  # fmt: skip
    return encode_rank(Trace({0: operations}, {"data/0": (0,)}, 1, "seed"), 0)
