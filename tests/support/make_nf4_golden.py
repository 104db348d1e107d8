"""Write nf4_golden.safetensors: what bitsandbytes makes of the weights in nf4_cases, on the CPU.

python -m tests.support.make_nf4_golden      # with bitsandbytes installed
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.nf4_cases import GOLDEN, WITH_NUMBERS, cases


def bitsandbytes_packs(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """bitsandbytes' code bytes (out, in / 2), absmax (out, in / 64) fp32, and numbers (out, in)."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    numbers = dequantize_4bit(codes, state)
    return codes.view(len(weight), -1), state.absmax.view(len(weight), -1), numbers


def write() -> None:
    tensors = {}
    for name, weight in cases().items():
        codes, absmax, numbers = bitsandbytes_packs(weight)
        tensors |= {f"{name}.codes": codes, f"{name}.absmax": absmax}
        if name in WITH_NUMBERS:
            tensors[f"{name}.bfloat16"] = numbers
            tensors[f"{name}.float32"] = bitsandbytes_packs(weight.float())[2]
    about = {"bitsandbytes": version("bitsandbytes"), "torch": torch.__version__}
    save_file(tensors, GOLDEN, metadata=about)


if __name__ == "__main__":
    write()
