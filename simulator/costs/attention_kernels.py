"""How much slower older fused attention kernels are than the accelerator's best."""

from __future__ import annotations

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


def attention_slowdown(kernel: str, family: str) -> float:
    """Time of fused kernel `kernel` over that of the best on an accelerator family.

    Raises
    ------
    InputError
        For an unknown kernel.
    """
    if kernel not in KERNELS:
        raise unknown_name("attention kernel", kernel, KERNELS)
    if kernel == "best":
        return 1.0
    factor = _OVER_FLASH2.get(family, 1.0)
    if kernel == "triton":
        factor *= FLASH2_OVER_TRITON
    elif kernel == "flash1":
        factor *= FLASH2_OVER_FLASH1
    return factor
