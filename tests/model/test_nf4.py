"""4-bit weights against bitsandbytes, and against exact arithmetic; element by element."""

from __future__ import annotations

import weakref
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import zero_wrapper_for_fp_tensor_constructor
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.model.nf4 import LEVELS, PIECE, pack, unpack
from minilora.model.nf4_shape import BLOCK, packed_columns, packed_shapes, unpacked_columns
from minilora.settings.errors import RequestError
from tests.support.make_nf4_golden import bitsandbytes_packs
from tests.support.nf4_cases import GOLDEN, MIDPOINTS, WITH_NUMBERS, cases, every_quotient

CASES = cases()
SMALLEST_NORMAL = 2.0**-126  # of fp32 and of bf16
SMALL = 37, 3 * BLOCK


def parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The code bytes (out, in / 2), and the absmax (out, in / 64) in fp32."""
    codes = unpacked_columns(packed.shape[1]) // 2
    return packed[:, :codes], packed[:, codes:].clone().view(torch.bfloat16).float()


def levels_of(packed: Tensor) -> Tensor:
    """Which of the sixteen levels every weight has (out, in)."""
    codes, _ = parts(packed)
    return torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()


def exact_absmax(weight: Tensor) -> Tensor:
    """(out, in / 64, 1) fp64."""
    return weight.double().unflatten(1, (-1, BLOCK)).abs().amax(-1, keepdim=True)


def check_numbers(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Equal, also in sign; but a CPU's bf16 instruction makes numbers below the normal ones 0."""
    flushed = (exact.abs() < SMALLEST_NORMAL) & (theirs == 0)
    torch.testing.assert_close(found[~flushed], theirs[~flushed], rtol=0, atol=0)
    assert torch.equal(found.signbit(), theirs.signbit())


def check_against(codes: Tensor, absmax: Tensor, weight: Tensor) -> Tensor:
    packed = pack(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (len(weight), weight.shape[1] * 17 // 32)
    torch.testing.assert_close(parts(packed), (codes, absmax), rtol=0, atol=0)
    return packed


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """As bitsandbytes derives them (create_normal_map), there in fp32."""
    quantile = NormalDist().inv_cdf
    sides = [
        [quantile(0.9677083 - 0.4677083 * i / count) for i in range(count)] for count in (7, 8)
    ]
    expected = sorted([*(-number for number in sides[0]), 0.0, *sides[1]])
    assert LEVELS == pytest.approx([number / expected[-1] for number in expected], rel=0, abs=2e-7)
    assert all(number == torch.tensor(number, dtype=torch.float32).item() for number in LEVELS)


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_numbers_are_those_frozen_from_bitsandbytes(name: str) -> None:
    golden, weight = load_file(GOLDEN), CASES[name]
    packed = check_against(golden[f"{name}.codes"], golden[f"{name}.absmax"], weight)
    if name in WITH_NUMBERS:
        exact = unpack(packed, torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            theirs = golden[f"{name}.{str(dtype).removeprefix('torch.')}"]
            check_numbers(unpack(packed, dtype), theirs, exact)


@pytest.mark.parametrize("name", [*CASES, "every quotient", "a large one"])
def test_bytes_and_numbers_are_those_of_the_bitsandbytes_installed_here(name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="only compared with where it is installed")
    more = {"every quotient": every_quotient(), "a large one": torch.randn(256, 4096).bfloat16()}
    weight = {**CASES, **more}[name]
    for wide in (weight, weight.float()):
        codes, absmax, numbers = bitsandbytes_packs(wide)
        packed = check_against(codes, absmax, wide)
        check_numbers(unpack(packed, wide.dtype), numbers, unpack(packed, torch.float32))


@pytest.mark.parametrize("name", [*CASES, "every quotient"])
def test_every_weight_gets_the_nearest_level(name: str) -> None:
    """In fp64; not in blocks below the normal numbers, where bitsandbytes divides by 1e-38."""
    weight = CASES[name] if name in CASES else every_quotient()
    absmax = exact_absmax(weight)
    distances = weight.double().unflatten(1, (-1, BLOCK)) / absmax
    distances = (distances.unsqueeze(-1) - torch.tensor(LEVELS, dtype=torch.float64)).abs()
    found = levels_of(pack(weight)).view(distances.shape[:-1])
    normal = (absmax >= SMALLEST_NORMAL).expand_as(found)
    assert normal.any()
    assert torch.equal(found[normal], distances.argmin(-1)[normal])
    assert (found[(absmax == 0).expand_as(found)] == LEVELS.index(0.0)).all()


def test_no_quotient_of_two_bf16_numbers_is_near_a_midpoint() -> None:
    """So that no way of dividing, on whichever device, gives another level."""
    weight = every_quotient()
    quotients = weight.double().unflatten(1, (-1, BLOCK)) / exact_absmax(weight)
    midpoints = torch.tensor(MIDPOINTS, dtype=torch.float64)
    nearest = ((quotients.unsqueeze(-1) - midpoints) / midpoints).abs().amin()
    assert nearest > 10 * 2**-24  # the rounding error of one operation in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_level_times_absmax_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = pack(CASES[name])
    levels = torch.tensor(LEVELS, dtype=torch.float64)[levels_of(packed)]
    # The product of 24 and 8 bits is exact in fp64.
    exact = levels.unflatten(1, (-1, BLOCK)) * parts(packed)[1].double().unsqueeze(-1)
    found = unpack(packed, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, exact.flatten(1).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_unpacked_weights_are_packed_to_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    weight = CASES[name]
    packed = pack(weight)
    absmax = exact_absmax(weight)
    kept = ((absmax == 0) | (absmax >= SMALLEST_NORMAL)).all(1).flatten()
    assert kept.any()
    assert torch.equal(pack(unpack(packed, dtype))[kept], packed[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_numbers_are_rounded_to_bf16_first(dtype: torch.dtype) -> None:
    weight = torch.randn(SMALL, dtype=dtype)
    before = weight.clone()
    assert not torch.equal(weight, weight.bfloat16().to(dtype))
    assert torch.equal(pack(weight), pack(weight.bfloat16()))
    assert torch.equal(weight, before)


def test_a_number_that_is_not_finite_stays_visible() -> None:
    weight = torch.randn(3, 2 * BLOCK).bfloat16()
    weight[0, 5], weight[1, 70], weight[2, 3] = float("nan"), float("inf"), -float("inf")
    finite = unpack(pack(weight), torch.float32).unflatten(1, (-1, BLOCK)).isfinite().all(-1)
    assert finite.tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_a_rank_packs_only_the_rows_that_its_bytes_touch(ranks: int) -> None:
    """The partitions of ZeRO-3: equal runs of bytes, whose borders cut rows and numbers."""
    weight = torch.randn(SMALL).bfloat16()
    whole = pack(weight).flatten()
    size, row = -(-len(whole) // ranks), packed_columns(SMALL[1])
    for begin in range(0, len(whole), size):
        end = min(begin + size, len(whole))
        first, last = begin // row, -(-end // row)
        mine = pack(weight[first:last]).flatten()[begin - first * row : end - first * row]
        assert torch.equal(mine, whole[begin:end])


class Scratch(TorchDispatchMode):
    """The most bytes of tensors that were made inside and were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[weakref.ref[torch.UntypedStorage], int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.made[weakref.ref(storage)] = storage.nbytes()
        self.made = {made: size for made, size in self.made.items() if made() is not None}
        self.most = max(self.most, sum(self.made.values()))
        return result


@pytest.mark.parametrize("columns", [BLOCK, PIECE // 4 + BLOCK, PIECE + BLOCK])
def test_a_matrix_of_several_pieces(columns: int) -> None:
    """Equal to its rows on their own; with scratch memory for PIECE weights, or for one row."""
    rows, border = max(5 * PIECE // 2 // columns, 2), max(PIECE // columns, 1)
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    with Scratch() as packing:
        packed = pack(weight)
    with Scratch() as unpacking:
        found = unpack(packed, torch.bfloat16)
    scratch = 8.3 * border * columns  # bytes: two fp32 numbers, and what blocks have
    assert packing.most - packed.nbytes <= scratch
    assert unpacking.most - found.nbytes <= scratch

    # Cut where no piece ends.
    cuts = {0, border - 1, border + 1, 2 * border - 1, 2 * border + 1, rows}
    for begin, end in pairwise(sorted(cut for cut in cuts if cut <= rows)):
        assert torch.equal(packed[begin:end], pack(weight[begin:end]))
        assert torch.equal(found[begin:end], unpack(packed[begin:end], torch.bfloat16))


def test_the_packed_bytes_may_begin_anywhere() -> None:
    packed = pack(torch.randn(SMALL))
    moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
    assert moved.data_ptr() % 2
    assert torch.equal(unpack(moved, torch.float32), unpack(packed, torch.float32))


def test_where_deepspeed_makes_new_tensors_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside zero.Init, which replaces these functions, and under another default dtype."""
    weight = torch.randn(SMALL)
    packed = pack(weight)
    numbers = unpack(packed, torch.float32)
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn"):
        cpu = torch.device("cpu")
        wrapped = zero_wrapper_for_fp_tensor_constructor(getattr(torch, name), torch.bfloat16, cpu)
        monkeypatch.setattr(torch, name, wrapped)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(pack(weight), packed)
        assert torch.equal(unpack(packed, torch.float32), numbers)
    finally:
        torch.set_default_dtype(torch.float32)


def test_shapes() -> None:
    assert [packed_columns(columns) for columns in (64, 4096, 14336)] == [34, 2176, 7616]
    assert [unpacked_columns(row_bytes) for row_bytes in (34, 2176, 7616)] == [64, 4096, 14336]
    assert packed_shapes({"q_proj": (8, 64), "up_proj": (3, 128)}) == {
        "q_proj": (8, 34),
        "up_proj": (3, 68),
    }


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(RequestError) as refused:
        packed_shapes({"q_proj": (64, 100), "o_proj": (100, 64), "down_proj": (64, 32)})
    assert refused.value.problems == (
        "q_proj has rows of 100 weights: quantization_bit: 4 needs a multiple of 64; without "
        "quantization_bit the weights stay in bf16",
        "down_proj has rows of 32 weights: quantization_bit: 4 needs a multiple of 64; without "
        "quantization_bit the weights stay in bf16",
    )
    with pytest.raises(AssertionError):
        pack(torch.randn(64, 100))
