"""Fit the constants of one-node NVLink collectives of `simulator/catalog/collectives.yaml`.

    python benchmarks/fit_collectives.py FILE.csv [--leave-out SOURCE ...]

Three generations of NVLink share one set of constants (`NVLink`, the rule for generations that
nobody measured); only the time of a call of no bytes (`base`) is each generation's own. The entry
of a measured generation is fitted again with a penalty on leaving the shared constants. Printed are
the entries, the errors of both, and those of whole generations left out: there the shared constants
come from the other two, `base` is their geometric mean, and nothing of the left-out generation is
used but its datasheet and NCCL's published constants. Of sources left out, only the errors are
printed; so is, of a fit on every second size of each run, the error on the sizes between.

The formula is that of `simulator.costs.collectives` in one NVSwitch domain (a test holds both
equal). R is the link's rate, w the bytes out of one member, o = b/n its own part:

    ring        min over LL, LL128 of  base + steps hop + w / rate
                Simple                 base + start + steps hop + ramp sqrt(w)
                                       + w / (share R) and (w + o) / (write R), the slower
    all_to_all  LL                     base + (n-1) hop + b / rate
                Simple                 base + start + (n-1) hop + ramp sqrt(b)
                                       + w / (share R) and b / (channels channel_rate), the slower
    nvls        base + start + b (1 + 1/n) / (share R) + ramp sqrt(b), or base + b (1 + 1/n) / rate
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from simulator.catalog.accelerators import Accelerator, accelerator
from simulator.costs.collectives_constants import LIMITS, P2P_CHANNELS

Array = np.ndarray
MB = 1e6

#: Where the shared constants hold: H100's NVLink, GB/s per direction, and clock, GHz.
REFERENCE = {"rate": 450.0, "clock": 1.83}
#: NCCL's tuning constants by GPU family (src/graph/tuning.cc, topo.h, NCCL 2.30): what one link
#: carries over its datasheet rate, efficiency of NVLS, largest rate of LL in one node (GB/s).
NCCL = {
    "ampere": {"line_share": 20 / 25, "nvls_share": 0.85, "ll_max": 87.7},
    "hopper": {"line_share": 20.6 / 25, "nvls_share": 0.85, "ll_max": 141.0},
    "blackwell": {"line_share": 40.1 / 50, "nvls_share": 0.74, "ll_max": 282.0},
}
NAMES = {"ampere": "NVLink3", "hopper": "NVLink4", "blackwell": "NVLink5"}

#: name -> (start value, lower, upper bound). hop_simple stays below NCCL's own constant for an
#: NVLink hop (3.4 us): with 2 and 8 GPUs it trades against the ramp, and it must extrapolate to 72.
BOUNDS: dict[str, tuple[float, float, float]] = {
    "ring.base": (7.0, 1.0, 20.0), "ring.start_simple": (4.0, 0.2, 20.0),
    "ring.hop_ll": (0.8, 0.1, 3.0), "ring.hop_ll128": (1.2, 0.1, 4.0),
    "ring.hop_simple": (0.8, 0.05, 3.4), "ring.rate_ll": (12.0, 2.0, 60.0),
    "ring.share_ll128": (0.7, 0.2, 1.5), "ring.share_simple": (0.98, 0.85, 1.1),
    "ring.ramp": (5.0, 0.5, 12.0), "ring.write": (1.16, 0.8, 3.0),
    "nvls.base": (15.0, 4.0, 40.0), "nvls.start_simple": (12.0, 0.2, 40.0),
    "nvls.share_simple": (1.0, 0.85, 1.15), "nvls.ramp": (8.0, 1.0, 25.0),
    "nvls.rate_ll": (100.0, 30.0, 400.0),
    "all_to_all.base": (7.0, 2.0, 20.0), "all_to_all.hop": (0.35, 0.02, 2.0),
    "all_to_all.rate_ll": (11.0, 2.0, 60.0), "all_to_all.start_simple": (3.0, 0.1, 20.0),
    "all_to_all.hop_simple": (0.3, 0.02, 2.0), "all_to_all.share_simple": (0.93, 0.8, 1.1),
    "all_to_all.ramp": (4.0, 0.5, 12.0), "all_to_all.channel_rate": (20.0, 8.0, 40.0),
}  # fmt: skip
#: Constants of a call of no bytes, each generation's own.
OWN = ("ring.base", "all_to_all.base", "nvls.base")
#: How far (in ln) a generation's own constants may leave the shared ones at the price of one
#: tenth of error in one row.
TETHER = 0.25


@dataclass(frozen=True)
class Machine:
    """What the rule knows of a generation: R in byte/us, clock ratio, NCCL's constants."""

    family: str
    rate: float
    clock: float
    line_share: float
    nvls_share: float
    ll_max: float
    nvls: bool

    @classmethod
    def of(cls, device: Accelerator) -> Machine:
        known = NCCL[device.family]
        clock = (device.clock_hz or REFERENCE["clock"] * 1e9) / (REFERENCE["clock"] * 1e9)
        nvls = device.family != "ampere"
        return cls(device.family, device.scale_up_bandwidth * 1e-6, clock, nvls=nvls, **known)

    @property
    def ramp_scale(self) -> float:
        """Filling a pipeline takes a chunk's time on the link and the SM's to hand it on."""
        return REFERENCE["rate"] * 1e3 / self.rate / self.clock


Params = Mapping[str, float]


def slower(link: Array, blocks: Array) -> Array:
    """Time of chunks that pass both limits, mostly that of the slower one."""
    return (link**LIMITS + blocks**LIMITS) ** (1 / LIMITS)


def ring_us(p: Params, at: Machine, op: Array, n: Array, b: Array) -> Array:
    """Microseconds of an out-of-place ring."""
    rounds = np.where(op == "all_reduce", 2.0, 1.0)
    wire, steps = rounds * (n - 1) / n * b, rounds * (n - 1)
    moved = slower(
        wire / (p["ring.share_simple"] * at.line_share * at.rate),
        (wire + b / n) / (p["ring.write"] * at.rate),
    )
    simple = p["ring.base"] + p["ring.start_simple"] + steps * p["ring.hop_simple"] + moved
    return np.minimum.reduce(
        [
            p["ring.base"] + steps * p["ring.hop_ll"] + wire / (p["ring.rate_ll"] * 1e3),
            p["ring.base"] + steps * p["ring.hop_ll128"]
            + wire / (p["ring.share_ll128"] * at.ll_max * 1e3),
            simple + p["ring.ramp"] * at.ramp_scale * np.sqrt(wire / MB),
        ]
    )  # fmt: skip


def nvls_us(p: Params, at: Machine, n: Array, b: Array) -> Array:
    """Microseconds of an all-reduce in the switch."""
    wire = b * (1 + 1 / n)
    share = p["nvls.share_simple"] * at.line_share * at.nvls_share
    return p["nvls.base"] + np.minimum(
        p["nvls.start_simple"] + wire / (share * at.rate) + p["nvls.ramp"] * np.sqrt(b / MB),
        wire / (p["nvls.rate_ll"] * 1e3),
    )


def all_to_all_us(p: Params, at: Machine, n: Array, b: Array) -> Array:
    """Microseconds of an all-to-all."""
    wire = (n - 1) / n * b
    channels = P2P_CHANNELS * p["all_to_all.channel_rate"] * at.clock * 1e3
    moved = slower(wire / (p["all_to_all.share_simple"] * at.line_share * at.rate), b / channels)
    return p["all_to_all.base"] + np.minimum(
        (n - 1) * p["all_to_all.hop"] + b / (p["all_to_all.rate_ll"] * 1e3),
        p["all_to_all.start_simple"] + (n - 1) * p["all_to_all.hop_simple"] + moved
        + p["all_to_all.ramp"] * at.ramp_scale * np.sqrt(b / MB),
    )  # fmt: skip


class Rows:
    """Measured rows of one generation."""

    def __init__(self, machine: Machine, data: pd.DataFrame) -> None:
        self.machine, self.data = machine, data
        self.op = data.collective.to_numpy()
        self.n, self.b = data.n_gpus.to_numpy(float), data.bytes.to_numpy(float)
        self.measured = data.latency_us.to_numpy(float)
        self.weight = np.where(self.b >= MB, 1.5, 0.6)

    def of_sources(self, names: list[str], *, keep: bool = True) -> Rows:
        """The rows of these sources, or of the others."""
        return Rows(self.machine, self.data[self.data.source.isin(names) == keep])

    def every_second_size(self, offset: int) -> Rows:
        """Of each run every second message size, starting at the first or the second."""
        runs = self.data.groupby(["gpu", "source", "collective", "n_gpus"]).bytes
        place = runs.rank(method="dense").to_numpy()
        return Rows(self.machine, self.data[place % 2 == offset])

    def predicted(self, p: Params) -> Array:
        at = self.machine
        time = ring_us(p, at, self.op, self.n, self.b)
        if at.nvls:
            switch = (self.op == "all_reduce") & (self.n >= 3)
            time = np.where(switch, np.minimum(time, nvls_us(p, at, self.n, self.b)), time)
        return np.where(self.op == "alltoall", all_to_all_us(p, at, self.n, self.b), time)

    def residual(self, p: Params) -> Array:
        """Robust (pseudo-Huber) weighted log error."""
        error = self.weight * np.log(self.predicted(p) / self.measured)
        return np.sign(error) * 0.08 * np.sqrt(2 * (np.sqrt(1 + (error / 0.08) ** 2) - 1))

    def error(self, p: Params) -> Array:
        return self.predicted(p) / self.measured - 1


def _least(
    names: list[str], start: Array, residual: object, attempts: int
) -> Array:  # fmt: skip
    """Logarithms of the constants with the least squares, from a few starting points."""
    low, high = (np.log([BOUNDS[k.split("@")[0]][i] for k in names]) for i in (1, 2))
    rng = np.random.default_rng(0)
    best = None
    for attempt in range(attempts):
        jitter = rng.normal(0, 0.2, len(names)) if attempt else 0.0
        at = np.clip(start + jitter, low + 1e-6, high - 1e-6)
        found = least_squares(residual, at, bounds=(low, high), max_nfev=100)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return np.asarray(best.x)


def fit_shared(rows: list[Rows], attempts: int = 6) -> tuple[dict[str, float], list[Params]]:
    """The shared constants (`OWN` ones: geometric means), and each generation's with its own."""
    names = [k for k in BOUNDS if k not in OWN]
    own = [f"{k}@{i}" for k in OWN for i, r in enumerate(rows) if "nvls" not in k or r.machine.nvls]
    every = names + own

    def split(q: Array) -> list[dict[str, float]]:
        value = dict(zip(every, np.exp(q).tolist(), strict=True))
        common = {k: value[k] for k in names}
        return [
            {**common, **{k: value.get(f"{k}@{i}", BOUNDS[k][0]) for k in OWN}}
            for i in range(len(rows))
        ]

    start = np.log([BOUNDS[k.split("@")[0]][0] for k in every])
    q = _least(
        every, start,
        lambda q: np.concatenate([r.residual(p) for r, p in zip(rows, split(q), strict=True)]),
        attempts,
    )  # fmt: skip
    value = dict(zip(every, np.exp(q).tolist(), strict=True))
    shared = {k: value[k] for k in names}
    for k in OWN:
        found = [v for name, v in value.items() if name.startswith(k + "@")]
        shared[k] = float(np.exp(np.mean(np.log(found)))) if found else BOUNDS[k][0]
    return shared, list(split(q))


def fit_own(rows: Rows, shared: Params, own: Params) -> dict[str, float]:
    """One generation's constants, tethered to the shared ones."""
    names = list(BOUNDS)
    start = np.log([own[k] for k in names])
    centre = np.log([own[k] if k in OWN else shared[k] for k in names])
    pull = np.array([0.04 if k in OWN else 0.25 for k in names]) * 0.25 / TETHER

    def residual(q: Array) -> Array:
        p = dict(zip(names, np.exp(q).tolist(), strict=True))
        return np.concatenate([rows.residual(p), (q - centre) * pull])

    q = _least(names, start, residual, 4)
    return dict(zip(names, np.exp(q).tolist(), strict=True))


BANDS = ((16e6, np.inf, ">= 16 MB"), (MB, 16e6, "1-16 MB"), (0.0, MB, "< 1 MB"))


def report(title: str, rows: list[Rows], params: list[Params]) -> None:
    """Median and 90th percentile of the absolute error, and the signed median, in %."""
    size = np.concatenate([r.b for r in rows])
    error = np.concatenate([r.error(p) for r, p in zip(rows, params, strict=True)])
    cells = []
    for low, high, name in BANDS:
        e = error[(size >= low) & (size < high)]
        if not len(e):
            continue
        cells.append(
            f"{name} (n {len(e)}): {100 * np.median(abs(e)):.1f} / "
            f"{100 * np.quantile(abs(e), 0.9):.1f} ({100 * np.median(e):+.1f})"
        )
    print(f"# {title:34s} " + "   ".join(cells))


def show(name: str, p: Params, machine: Machine | None) -> None:
    """The entry of the catalogue."""
    print(f"  {name}:")
    ll_max = machine.ll_max if machine else NCCL["hopper"]["ll_max"]
    for pattern in ("ring", "all_to_all", "nvls"):
        if machine is not None and pattern == "nvls" and not machine.nvls:
            continue
        entry = {k.split(".")[1]: v for k, v in p.items() if k.startswith(pattern + ".")}
        if pattern == "ring":
            rate = entry.pop("share_ll128") * ll_max
            entry |= {"rate_ll128": rate} if machine else {"share_ll128": rate / 450}
        if machine is not None:
            # At the generation's own rate and clock.
            if pattern != "nvls":
                entry["ramp"] *= machine.ramp_scale
            if "channel_rate" in entry:
                entry["channel_rate"] *= machine.clock
        print(f"    {pattern}: {{{', '.join(f'{k}: {v:.4g}' for k, v in entry.items())}}}")


def generations(path: str) -> list[Rows]:
    """One-node NVSwitch rows of a table of measurements, by generation."""
    table = pd.read_csv(path, comment="#")
    table = table[(table.n_nodes == 1) & (table.collective != "sendrecv")]
    found: dict[str, list[pd.DataFrame]] = {}
    machines: dict[str, Machine] = {}
    for gpu, rows in table.groupby("gpu"):
        machine = Machine.of(accelerator(str(gpu)))
        machines.setdefault(machine.family, machine)
        found.setdefault(machine.family, []).append(rows)
    return [Rows(machines[f], pd.concat(found[f])) for f in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--leave-out", nargs="*", default=[], help="names of the column `source`")
    arguments = parser.parse_args()
    every = generations(arguments.data)
    rows = [r.of_sources(arguments.leave_out, keep=False) for r in every]
    shared, each = fit_shared(rows)
    show("NVLink", shared, None)
    own = [fit_own(r, shared, p) for r, p in zip(rows, each, strict=True)]
    for r, p in zip(rows, own, strict=True):
        show(NAMES[r.machine.family], p, r.machine)
    report("one rule, own base, in sample", rows, each)
    report("one rule, mean base, in sample", rows, [shared] * len(rows))
    report("own constants, in sample", rows, list(own))
    for source in arguments.leave_out:
        for r, p in zip(every, own, strict=True):
            found = r.of_sources([source])
            for op in sorted(set(found.op)):
                some = Rows(r.machine, found.data[found.data.collective == op])
                report(f"{source} {NAMES[r.machine.family]} {op}, left out", [some], [p])
    left_out: list[Params] = []
    for i, r in enumerate(rows):
        others, _ = fit_shared([s for j, s in enumerate(rows) if j != i])
        left_out.append(others)
        report(f"{NAMES[r.machine.family]} left out", [r], [others])
    report("all generations left out in turn", rows, left_out)
    between: list[tuple[Rows, Params]] = []
    for offset in (0, 1):
        half = [r.every_second_size(offset) for r in rows]
        common, separate = fit_shared(half)
        for r, h, p in zip(rows, half, separate, strict=True):
            between.append((r.every_second_size(1 - offset), fit_own(h, common, p)))
    report("every second size left out", [r for r, _ in between], [p for _, p in between])


if __name__ == "__main__":
    main()
