"""Ranks that a token's experts are on."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.model.library import model
from simulator.model.routing import Routing


@pytest.mark.parametrize(
    ("routing", "places"),
    [
        (Routing(64, 6), 8),
        (Routing(256, 8, 8, 4), 8),
        (Routing(256, 8, 8, 4), 64),
        (Routing(256, 8, 8, 4), 2),
        (Routing(160, 6, 8, 3), 4),
    ],
)
def test_share_is_that_of_drawn_tokens(routing: Routing, places: int) -> None:
    rng = np.random.default_rng(0)
    size = routing.experts // routing.groups
    seen = 0.0
    draws = 4000
    for _ in range(draws):
        groups = rng.choice(routing.groups, routing.group_limit, replace=False)
        eligible = (groups[:, None] * size + np.arange(size)).ravel()
        experts = rng.choice(eligible, routing.top_k, replace=False)
        seen += len(np.unique(experts // (routing.experts // places))) / places
    assert routing.reached(places) == pytest.approx(seen / draws, rel=0.02)


def test_limits() -> None:
    assert Routing(8, 8).reached(8) == 1.0
    assert Routing(8, 1).reached(8) == pytest.approx(1 / 8)
    assert Routing(64, 6).reached(1) == 1.0
    limited = model("deepseek-v3").routing
    assert limited.reached(8) <= 4 / 8, "at most four of eight nodes"
    assert limited.reached(8) < Routing(256, 8).reached(8)


def test_groups_must_divide_the_experts_and_hold_enough() -> None:
    from simulator.model.lookup import resolve_model

    base = {
        "family": "moe", "layers": 2, "hidden": 64, "heads": 2, "vocab": 100, "n_experts": 16,
        "top_k": 4, "expert_ffn": 64,
    }  # fmt: skip
    for groups, limit, what in ((3, 1, "divide"), (4, 5, "router_group_limit"), (8, 1, "top_k")):
        with pytest.raises(InputError, match=what):
            resolve_model({**base, "router_groups": groups, "router_group_limit": limit})
