"""Where the tokens of a mixture of experts go."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Routing:
    """A router that draws `top_k` of `experts` for each token, balanced.

    With `groups` of experts it first chooses `group_limit` of them (DeepSeek-V2, arXiv 2405.04434,
    section 2.2.2: device-limited routing; `n_group` and `topk_group` of released configurations).
    """

    experts: int
    top_k: int
    groups: int = 1
    group_limit: int = 1

    def reached(self, places: int) -> float:
        """Share of the ranks (or nodes) that hold at least one of a token's experts.

        Experts are spread evenly over `places`, a group's experts together; within the groups that
        a token chose, 1 - C(E - e, k) / C(E, k) for e of their E experts.
        """
        per_group = self.experts // self.groups
        eligible = per_group * self.group_limit
        if places >= self.groups:
            chosen = self.group_limit / self.groups
            return chosen * self._hit(eligible, self.experts // places)
        held = self.groups // places
        draws = math.comb(self.groups, self.group_limit)
        return sum(
            math.comb(held, chosen)
            * math.comb(self.groups - held, self.group_limit - chosen)
            / draws
            * self._hit(eligible, chosen * per_group)
            for chosen in range(min(held, self.group_limit) + 1)
        )

    def _hit(self, eligible: int, here: int) -> float:
        missed = math.comb(max(0, eligible - here), self.top_k) / math.comb(eligible, self.top_k)
        return 1.0 - missed
