"""Write pytorch_digests.json: hashes of the orders of PyTorch's schedule classes.

Run with a Python that has torch: `python tests/schedules/record_pytorch_digests.py`. The test
compares orders by these hashes where torch is not installed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

RANKS = (1, 2, 3, 4, 6, 8)
CHUNKS = {
    "LoopedBFS": (1, 2, 3),
    "Interleaved1F1B": (1, 2, 3, 4),
    "InterleavedZeroBubble": (1, 2, 3, 4),
    "ZBVZeroBubble": (2,),
    "DualPipeV": (2,),
}


def digest(orders: list[list[str]]) -> str:
    """A short hash of per-rank orders."""
    text = "\n".join(",".join(order) for order in orders)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    import torch
    from test_pytorch import _multi, _texts

    rows: list[list[object]] = []
    for name, chunks in CHUNKS.items():
        for ranks in RANKS:
            for virtual in chunks:
                for m in sorted(
                    {1, ranks - 1, ranks, ranks + 1, 2 * ranks - 1, 2 * ranks, 5 * ranks}
                ):
                    if m < 1:
                        continue
                    try:
                        theirs = _multi(name, ranks, m, virtual)
                    except ValueError:
                        rows.append([name, ranks, m, virtual, None, None])
                        continue
                    order = digest(_texts(theirs.pipeline_order))
                    lowered = digest(_texts(theirs.pipeline_order_with_comms))
                    rows.append([name, ranks, m, virtual, order, lowered])
    path = Path(__file__).parent / "pytorch_digests.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
