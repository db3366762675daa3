"""Whether float32 matrices are multiplied as TF32, which keeps 10 bits of a mantissa. Must not change it."""

import torch


def tf32_is_on() -> bool:
    """As PyTorch is told in this process, by either of its interfaces; a device that has no TF32 does not use it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # from PyTorch 2.9 on; the older flag cannot be read once this one is set
        return str(matmul.fp32_precision) == "tf32"
    return bool(matmul.allow_tf32)
