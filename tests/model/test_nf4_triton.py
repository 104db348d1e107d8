"""The fused unpacking against plain torch: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora.model import nf4
from tests.support.nf4_cases import cases

ROOT = Path(__file__).resolve().parent.parent.parent
NO_TRITON = "Triton comes with torch for CUDA only: pip install triton"


def test_plain_torch_does_it_where_triton_cannot() -> None:
    """Without the package, or with it: a CPU's tensor is nothing that a kernel can take."""
    with pytest.warns(UserWarning, match="unpacked without Triton"):
        assert nf4._fused(torch.device("cpu"), torch.float32) is None


@pytest.mark.slow
def test_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.nf4_in_triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"compared: {4 * (len(cases()) + 1)}\n"), done


@pytest.mark.slow
def test_the_compiled_kernel_rounds_bf16_and_flushes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for a GPU of 2020, which needs none here; the interpreter does not round bf16."""
    triton = pytest.importorskip("triton", reason=NO_TRITON)
    from minilora.model.nf4_triton import BLOCKS_PER_PROGRAM, _unpack_blocks

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"packed": "*u8", "levels": "*fp32", "weight": "*bf16"}
    source = triton.compiler.ASTSource(
        fn=_unpack_blocks,
        signature={**pointers, "blocks": "i32", "row_blocks": "i32", "COUNT": "constexpr"},
        constexprs={(5,): BLOCKS_PER_PROGRAM},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    instructions = triton.compile(source, target=target).asm["ptx"]
    assert "cvt.rn.bf16" in instructions  # to the nearest, and to even
    assert "cvt.rz" not in instructions and ".ftz" not in instructions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, CUDA_VISIBLE_DEVICES=0")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", cases())
def test_a_gpu_gives_the_same_bytes_and_numbers(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    weight = cases()[name]
    packed, gpu = nf4.pack(weight), torch.device("cuda", 0)
    assert torch.equal(nf4.pack(weight.to(gpu)).cpu(), packed)
    expected = nf4.unpack(packed, dtype)
    plain = expected.to(gpu).fill_(7)
    nf4._unpack_plain(packed.to(gpu), nf4._levels(gpu), plain)
    assert torch.equal(plain.cpu(), expected)
    assert nf4._fused(gpu, dtype) is not None
    assert torch.equal(nf4.unpack(packed.to(gpu), dtype).cpu(), expected)
