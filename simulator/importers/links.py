"""Link rates that foreign topology descriptions name by technology and generation only.

All rates are byte/s per direction of payload-carrying line rate.
"""

from __future__ import annotations

import re

from simulator.errors import InputError

#: NVLink byte/s per link and direction by CUDA compute capability. NVIDIA whitepapers: P100 (20
#: GB/s), V100 (25), GA100 (25), GA102 (14.0625), GH100 (25), Blackwell (50).
NVLINK_BY_SM: dict[int, float] = {
    60: 20e9, 61: 20e9, 70: 25e9, 72: 25e9, 80: 25e9, 86: 14.0625e9, 90: 25e9, 100: 50e9,
    103: 50e9, 120: 50e9,
}  # fmt: skip

#: GT/s per lane -> bits of payload per transferred bit: 8b/10b up to PCIe 2, 128b/130b from PCIe 3,
#: 242/256 flits in PCIe 6 (PCI Express Base Specification, "Physical Layer Logical Block").
_PCIE_CODING: dict[float, float] = {
    2.5: 0.8, 5.0: 0.8, 8.0: 128 / 130, 16.0: 128 / 130, 32.0: 128 / 130, 64.0: 242 / 256,
}  # fmt: skip

#: Rate of a PCIe link of which neither speed nor width is known (virtual machines hide them):
#: Gen3 x16, what NCCL assumes (src/graph/topo.cc: an empty link_speed is Gen3, width 0 is 16).
PCIE_DEFAULT = 8e9 * 16 * 128 / 130 / 8

#: Routing metric of a PCIe link (NVLink and network links: 1): traffic between accelerators stays
#: on NVLink where there is any, however few PCIe bridges lie between them, as NCCL's paths do.
PCIE_WEIGHT = 4.0

#: CPU socket to socket, byte/s. NCCL src/graph/topo.h (QPI_BW, SKL_QPI_BW, AMD_BW, ZPI_BW, ARM_BW,
#: P9_BW), which it measured as what accelerators reach between sockets.
SOCKET_BY_VENDOR: dict[str, float] = {
    "GenuineIntel": 10e9, "AuthenticAMD": 16e9, "CentaurHauls": 6e9, "  Shanghai  ": 6e9,
    "arm64": 6e9, "aarch64": 6e9, "ppc64": 32e9, "ppc64le": 32e9,
}  # fmt: skip
SOCKET_DEFAULT = 10e9

#: PCI device id -> name in the accelerator catalogue (The PCI ID Repository, vendor 10de).
DEVICE_NAMES: dict[str, str] = {
    "0x15f9": "P100-SXM2-16GB", "0x15f8": "P100", "0x1db1": "V100-16GB-SXM2", "0x1db5": "V100",
    "0x1db8": "V100-SXM3-32GB", "0x1db6": "V100-PCIe", "0x1eb8": "T4", "0x20b0": "A100-40GB",
    "0x20b2": "A100", "0x20b5": "A100-PCIe", "0x20f1": "A100-PCIe-40GB", "0x20f3": "A800",
    "0x2236": "A10", "0x2237": "A10G", "0x2235": "A40", "0x2230": "A6000", "0x27b8": "L4",
    "0x26b5": "L40", "0x26b9": "L40S", "0x2330": "H100", "0x2331": "H100-PCIe-80GB",
    "0x2321": "H100-NVL-94GB", "0x2324": "H800", "0x2329": "H20", "0x2335": "H200",
    "0x2342": "GH200-SXM", "0x2901": "B200", "0x2941": "GB200", "0x3182": "B300",
}  # fmt: skip


def pcie_bandwidth(speed: str, width: str, *, place: str | None = None) -> float:
    """byte/s per direction of a PCIe link as the Linux kernel prints it.

    Parameters
    ----------
    speed:
        `current_link_speed` of sysfs: "16.0 GT/s PCIe", also "16 GT/s"; empty or "Unknown" where
        hidden.
    width:
        `current_link_width`: number of lanes; "0" or empty where hidden.

    Raises
    ------
    InputError
        If either is no such text.
    """
    match = re.match(r"^\s*(\d+(?:\.\d+)?)\s*GT/s", speed)
    if match is None and speed.strip() and not speed.strip().lower().startswith("unknown"):
        raise InputError(f"expected a speed such as '16.0 GT/s PCIe', got {speed!r}", place=place)
    rate = float(match.group(1)) if match else 8.0
    if rate not in _PCIE_CODING:
        known = ", ".join(f"{value:g}" for value in _PCIE_CODING)
        raise InputError(f"no PCIe generation has {rate:g} GT/s (known: {known})", place=place)
    text = width.strip() or "0"
    if not (text.isascii() and text.isdigit()) or int(text[:4]) > 32:
        raise InputError(f"expected a number of lanes up to 32, got {width!r}", place=place)
    lanes = int(text) or 16
    return rate * 1e9 * lanes * _PCIE_CODING[rate] / 8


def network_kind(device: str) -> str:
    """Link technology by the name of a network device."""
    name = device.lower()
    if name.startswith(("efa", "rdmap")):
        return "EFA"
    if name.startswith(("mlx", "ib", "hfi", "opa")):
        return "InfiniBand"
    if name.startswith(("roce", "bnxt_re", "rocep")):
        return "RoCE"
    if name.startswith(("cxi", "hsn")):
        return "Slingshot"
    return "Ethernet"
