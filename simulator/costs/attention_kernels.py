"""How much slower older fused attention kernels are than the accelerator's best."""

from __future__ import annotations

import re

from simulator.errors import unknown_name

#: Seconds of a kernel over those of the next better one, forward and backward together, causal,
#: head dimension 128, long sequences. FlashAttention-2 against FlashAttention and its Triton
#: version on A100: Dao, arXiv 2307.08691, figures 4-6 (about 190 against 110 and 115 TFLOP/s);
#: FlashAttention-3 against FlashAttention-2 on H100: Shah et al., arXiv 2407.08608, figures 5-6
#: (1.5-2.0 times forward, 1.5-1.75 times backward); cuDNN against FlashAttention-2 on B200 and
#: GB200: train_attention_cudnn.csv (2.9-3.9 times).
FLASH2_OVER_FLASH1 = 1.75
FLASH2_OVER_TRITON = 1.65
FLASH3_OVER_FLASH2 = 1.75
CUDNN_OVER_FLASH2_BLACKWELL = 3.3

#: By family whose best kernel uses warp specialisation (FlashAttention-3, cuDNN 9), how much faster
#: it is than FlashAttention-2.
_OVER_FLASH2 = {"hopper": FLASH3_OVER_FLASH2, "blackwell": CUDNN_OVER_FLASH2_BLACKWELL}

KERNELS = ("best", "flash2", "triton", "flash1")

#: What others call the best kernel of the accelerators that they write it for; besides cuDNN's, and
#: FlashAttention-3 and later.
_BEST = frozenset({"best", "fused", "fusedattention", "te", "transformerengine", "splash", "ck"})
_FLASH = re.compile(r"(?:vllm)?(?:flash(?:attention|attn)?|fa)(?:fa|v)?([1-4]\d*)?")


def fused_kernel(name: str) -> str:
    """Which of `KERNELS` a profile or a measured file means by `name`, as liberally as is safe.

    `FlashAttention-2`, `flash_attn 2.7.4` and `fa2` are flash2, as is FlashAttention without a
    version: that is what its package holds.

    Raises
    ------
    InputError
        For an unknown kernel.
    """
    folded = re.sub(r"[^a-z0-9]", "", name.casefold())
    if folded in _BEST or "cudnn" in folded:
        return "best"
    if "triton" in folded:
        return "triton"
    if match := _FLASH.fullmatch(folded):
        return {"1": "flash1", "2": "flash2"}.get((match[1] or "2")[0], "best")
    raise unknown_name("attention kernel", name, (*KERNELS, "cudnn", "flash3"))


def attention_slowdown(kernel: str, family: str) -> float:
    """Time of fused kernel `kernel` over that of the best on an accelerator family.

    Raises
    ------
    InputError
        For an unknown kernel.
    """
    kernel = fused_kernel(kernel)
    if kernel == "best":
        return 1.0
    factor = _OVER_FLASH2.get(family, 1.0)
    if kernel == "triton":
        factor *= FLASH2_OVER_TRITON
    elif kernel == "flash1":
        factor *= FLASH2_OVER_FLASH1
    return factor
