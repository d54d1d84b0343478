"""PyTorch modules on the meta device: parameters and FLOPs as PyTorch counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch")
nn = torch.nn

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from simulator.errors import InputError  # noqa: E402
from simulator.experiment import parse_experiment  # noqa: E402
from simulator.importers import TracedModel, model_from_torch  # noqa: E402
from simulator.importers.traced import traced_from_mapping  # noqa: E402
from simulator.simulation import run  # noqa: E402


class GPT(nn.Module):
    """Token and position embeddings, pre-norm blocks, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 64)
        self.positions = nn.Embedding(16, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True, dropout=0.0)
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Any) -> Any:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(16, 32)

    def forward(self, x: Any) -> Any:
        return self.cells(x)[0]


def regression_loss(y: Any) -> Any:
    return nn.functional.mse_loss(y, torch.zeros_like(y))


def token_loss(y: Any) -> Any:
    target = torch.zeros(y.shape[0] * y.shape[1], dtype=torch.long, device=y.device)
    return nn.functional.cross_entropy(y.flatten(0, 1), target)


def encoder(layers: int = 3, width: int = 64) -> Any:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


CASES: dict[str, tuple[Any, tuple[Any, ...], Any]] = {
    "linear regression": (lambda: nn.Linear(8, 1), ((32, 8),), regression_loss),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), ((32, 8),), None,
    ),
    "encoder": (encoder, ((2, 16, 64),), None),
    "gpt": (GPT, ("ids",), token_loss),
    "encoder-decoder": (
        lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), ((2, 8, 32), (2, 6, 32)), None,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ), ((4, 3, 32, 32),), None,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2)), ((2, 4, 8, 8),), None,
    ),
    "recurrent": (Recurrent, ((5, 2, 16),), None),
}  # fmt: skip


def case(name: str) -> tuple[Any, tuple[Any, ...], Any]:
    make, shapes, loss = CASES[name]
    with torch.device("meta"):
        inputs = tuple(
            torch.zeros(2, 16, dtype=torch.long) if shape == "ids" else torch.zeros(shape)
            for shape in shapes
        )
        return make(), inputs, loss


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_flops_equal_the_flop_counter(name: str) -> None:
    module, inputs, loss = case(name)
    traced = model_from_torch(module, inputs, loss=loss)
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
        forward = counter.get_total_flops()
        output = loss(output) if loss else output
        torch.autograd.backward([output], [torch.empty_like(output)])
    assert traced.parameters == sum(p.numel() for p in module.parameters())
    assert traced.forward_flops == forward > 0
    assert traced.flops == counter.get_total_flops()
    for layer in traced.layers:
        # every counted FLOP is that of a matrix product; the fused attention's kernel halves a
        # causal mask's and computes the scores again in the backward
        kinds = [(op.operation.kind, op.operation.flops) for op in layer.forward]
        gemm = sum(flops for kind, flops in kinds if kind == "gemm")
        attention = sum(flops for kind, flops in kinds if kind == "attention")
        assert gemm + (2 if name == "gpt" else 1) * attention == layer.forward_flops


@pytest.mark.parametrize("name", CASES)
def test_as_data_and_back(name: str) -> None:
    module, inputs, loss = case(name)
    traced = model_from_torch(module, inputs, loss=loss)
    mapping = yaml.safe_load(yaml.safe_dump(traced.to_mapping()))
    back = traced_from_mapping(mapping)
    assert [(a.forward, a.backward, a.stored_bytes) for a in back.layers] == [
        (a.forward, a.backward, a.stored_bytes) for a in traced.layers
    ]
    assert back.to_mapping() == traced.to_mapping()
    assert back.parameters == traced.parameters
    assert back.flops == traced.flops


def test_layers_of_a_gpt() -> None:
    module, inputs, loss = case("gpt")
    traced = model_from_torch(module, inputs, loss=loss)
    assert [layer.role for layer in traced.layers] == ["embedding", *["block"] * 4, "head"]
    assert traced.sequence == 16
    # the tied output projection is the embedding's
    assert traced.layers[0].parameters == 100 * 64 + 16 * 64
    assert traced.layers[-1].parameters == 2 * 64
    block = traced.blocks[1]
    assert [op.operation.kind for op in block.forward].count("attention") == 1
    assert block.output_bytes == 2 * 16 * 64 * 4
    # equal blocks are written once
    assert [item.get("repeat", 1) for item in traced.to_mapping()["layers"]] == [1, 4, 1]


def test_weight_gradients_are_apart() -> None:
    module, inputs, _ = case("mlp")
    traced = model_from_torch(module, inputs)
    first, second = traced.blocks
    gemms = [
        [(op.operation.phase, op.operation.m, op.operation.n, op.operation.k)
         for op in layer.backward if op.operation.kind == "gemm"]
        for layer in (first, second)
    ]  # fmt: skip
    # the first layer's input needs no gradient
    assert gemms == [[("W", 16, 8, 32)], [("I", 32, 16, 4), ("W", 4, 16, 32)]]
    assert all(
        op.operation.phase == "W" for op in second.backward if op.operation.name.endswith("sum")
    )


@pytest.mark.parametrize("name", ["linear regression", "mlp", "encoder", "gpt", "convolutions"])
def test_a_trace_at_one_batch_predicts_another(name: str) -> None:
    module, inputs, loss = case(name)
    traced = model_from_torch(module, inputs, loss=loss)
    assert traced.scalable
    bigger = tuple(
        torch.zeros((5 * t.shape[0], *t.shape[1:]), dtype=t.dtype, device="meta") for t in inputs
    )
    direct = model_from_torch(module, bigger, loss=loss)
    extra = direct.batch - traced.batch
    for ours, theirs in zip(traced.layers, direct.layers, strict=True):
        for a, b in zip(
            (*ours.forward, *ours.backward), (*theirs.forward, *theirs.backward), strict=True
        ):
            assert a.at(extra) == b.operation


def test_the_module_is_not_changed() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    module.eval()
    model_from_torch(module, torch.zeros(4, 3))
    assert module.weight.device.type == "cpu"
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None
    assert not module.training


def experiment(model: Any, **changes: Any) -> Any:
    return parse_experiment(
        {
            "model": model,
            "cluster": {"topology": "dgx-h100", "nodes": 1},
            "training": {"global_batch_size": 64, "optimizer": "sgd"},
        }
        | changes
    )


@pytest.fixture(scope="module")
def traced() -> TracedModel:
    with torch.device("meta"):
        return model_from_torch(encoder(8, 512), torch.zeros(2, 128, 512))


def test_regression_with_sgd_runs() -> None:
    module, inputs, loss = case("linear regression")
    model = model_from_torch(module, inputs, loss=loss).to_mapping()
    result = run(experiment(model))
    assert result.summary.model_flops_per_step == pytest.approx(64 * 4 * 8)
    assert result.timeline.frame([0])["flops"].sum() > 0


def test_data_and_pipeline_parallel_runs(traced: TracedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(traced.to_mapping()))
    whole = run(experiment(str(path)))
    training = {"global_batch_size": 64, "micro_batch_size": 4, "optimizer": "sgd"}
    halves = run(experiment(str(path), parallel={"pipeline": 2}, training=training))
    again = run(
        experiment(str(path), parallel={"pipeline": 2}, training={**training, "recompute": "full"})
    )
    assert whole.summary.model_flops_per_step == pytest.approx(traced.flops / 2 * 64)
    assert halves.summary.model_flops_per_step == whole.summary.model_flops_per_step
    assert again.summary.step_time_s > halves.summary.step_time_s
    # the forward runs twice
    ratio = again.summary.hardware_flops_per_step / halves.summary.hardware_flops_per_step
    assert ratio == pytest.approx(1 + traced.forward_flops / traced.flops, rel=0.02)
    assert again.memory.stages[0].activations < halves.memory.stages[0].activations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"tensor": 2}}, "data and pipeline parallelism only"),
        ({"training": {"sequence_length": 7}}, "traced with"),
    ],
)
def test_what_a_trace_cannot_do(traced: TracedModel, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(experiment(traced.to_mapping(), **changes))


class Peeking(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * x.sum().item()


def test_clear_errors() -> None:
    with pytest.raises(InputError, match="meta device"):
        model_from_torch(Peeking(), torch.zeros(2, 3))
    with pytest.raises(InputError, match="meta device"):
        model_from_torch(nn.Linear(4, 2), torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module"):
        model_from_torch(3, torch.zeros(2, 3))
    with pytest.raises(InputError, match="batch"):
        model_from_torch(nn.Linear(4, 2), ())
    with pytest.raises(InputError, match="no submodule"):
        model_from_torch(nn.Linear(4, 2), torch.zeros(2, 4), blocks=["h.*"])


def test_chosen_blocks() -> None:
    module, inputs, _ = case("mlp")
    traced = model_from_torch(module, inputs, blocks=["2"])
    assert [layer.role for layer in traced.layers] == ["embedding", "block"]
