"""The orders and files against a real PyTorch; skipped where torch is not installed."""

from __future__ import annotations

import pytest

from simulator.errors import InputError
from simulator.schedules import build, describe, lower, read_schedule, to_csv, validate, write_csv

torch = pytest.importorskip("torch")
schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

RANKS = (1, 2, 3, 4, 5, 8)
MULTI = ("looped-bfs", "interleaved-1f1b", "interleaved-zb", "zb-v", "dualpipe-v")


class _Stage:
    """What the schedule classes ask of a stage, recording the passes that they run."""

    def __init__(self, index: int, stages: int, ranks: int) -> None:
        self.stage_index = index
        self.num_stages = stages
        self.group_size = ranks
        self.group_rank = index % ranks
        self.is_first = index == 0
        self.is_last = index == stages - 1
        self.device = torch.device("cpu")
        self.submod = None
        self.has_backward = True
        self.trace: list[str] = []
        self.stage_index_to_group_rank = {s: s % ranks for s in range(stages)}

    def get_fwd_recv_ops(self, k: int) -> list[object]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def forward_one_chunk(self, k: int, *args: object, **kwargs: object) -> object:
        self.trace.append(f"{self.stage_index}F{k}")
        return torch.zeros(1)

    def backward_one_chunk(self, k: int, *args: object, **kwargs: object) -> None:
        self.trace.append(f"{self.stage_index}B{k}")

    def clear_runtime_states(self) -> None:
        pass

    def perform_reduce_grad(self, *args: object) -> None:
        pass

    scale_grads = perform_reduce_grad


def _class(name: str) -> type:
    return schedules.get_schedule_class(describe(name).pytorch)


def _multi(name: str, ranks: int, microbatches: int, virtual: int):
    """PyTorch's schedule object as rank 0 would make it."""
    stages = [_Stage(i * ranks, ranks * virtual, ranks) for i in range(virtual)]
    return _class(name)(stages, microbatches, loss_fn=lambda *a: torch.zeros(1))


def _texts(order: dict[int, list[object]]) -> list[list[str]]:
    return [[str(a) for a in order[rank] if a is not None] for rank in sorted(order)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MULTI)
def test_order_is_pytorchs(name: str, ranks: int) -> None:
    chunks = (2,) if describe(name).chunks == "2" else (1, 2, 3)
    tried = 0
    for virtual in chunks:
        for m in range(1, 3 * ranks + 3):
            try:
                theirs = _multi(name, ranks, m, virtual)
            except ValueError:
                with pytest.raises(InputError):
                    build(name, ranks, m, virtual)
                continue
            ours = build(name, ranks, m, virtual)
            assert ours.action_texts() == _texts(theirs.pipeline_order), (ranks, m, virtual)
            assert dict(enumerate(ours.stage_to_rank)) == theirs.stage_index_to_group_rank
            assert lower(ours).action_texts() == _texts(theirs.pipeline_order_with_comms)
            tried += 1
    assert tried


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", RANKS)
def test_runtime_order_is_pytorchs(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPipe and 1F1B are compared with what the runtime does, not with its own listing.

    PyTorch's `Schedule1F1B._get_pipeline_order` numbers the last rank's forwards from 1.
    """
    monkeypatch.setattr(schedules.PipelineScheduleSingle, "_initialize_stage", lambda *a: None)
    for m in range(1, 3 * ranks + 3):
        ours = build(name, ranks, m)
        for rank in range(ranks):
            stage = _Stage(rank, ranks, ranks)
            try:
                schedule = _class(name)(stage, m, loss_fn=lambda *a: torch.zeros(1))
            except ValueError:
                assert m < ranks
                with pytest.raises(InputError, match="greater than or equal"):
                    build(name, ranks, m, strict="pytorch")
                continue
            schedule._step_microbatches([()] * m, [{}] * m, [None] * m)
            assert ours.action_texts()[rank] == stage.trace


@pytest.mark.parametrize("name", MULTI)
def test_csv_loads_in_pytorch(name: str, tmp_path) -> None:
    ranks, m, virtual = 4, 8, 1 if describe(name).chunks == "1" else 2
    ours = build(name, ranks, m, virtual)
    path = tmp_path / "order.csv"
    write_csv(ours, path)
    loaded = _multi("zb-v" if "v" in name[-1] else "looped-bfs", ranks, m, virtual)
    loaded._load_csv(str(path), format="compute_only")
    assert _texts(loaded.pipeline_order) == ours.action_texts()
    assert _texts(loaded.pipeline_order_with_comms) == lower(ours).action_texts()
    # And back: with communication actions written out, by PyTorch's own dump.
    dumped = tmp_path / "lowered.csv"
    loaded._dump_csv(str(dumped), format="compute_comms")
    again = read_schedule(dumped)
    validate(again)
    assert to_csv(again) == dumped.read_bytes().decode()
    loaded._load_csv(str(dumped), format="compute_comms")
    assert _texts(loaded.pipeline_order_with_comms) == again.action_texts()
