"""The chunked head and loss against full logits and torch's cross_entropy."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.model.loss import CHUNK_ROWS, head_loss, head_scores

ROWS = (1, CHUNK_ROWS - 1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3)


def sample(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(50, 24, dtype=dtype), torch.randint(0, 50, (rows,))


@pytest.mark.parametrize("wanted", ["hidden", "weight", "both"])
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradients_equal_full_logits(rows: int, wanted: str) -> None:
    hidden, weight, targets = sample(rows)
    hidden.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "hidden")
    leaves = [leaf for leaf in (hidden, weight) if leaf.requires_grad]
    mine = head_loss(hidden, weight, targets, 0.37)
    mine_grads = torch.autograd.grad(mine * 3, leaves)
    full = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.37
    full_grads = torch.autograd.grad(full * 3, leaves)
    torch.testing.assert_close(mine, full, rtol=1e-5, atol=1e-5)
    for mine_grad, full_grad in zip(mine_grads, full_grads, strict=True):
        scale = float(full_grad.abs().max())
        torch.testing.assert_close(mine_grad, full_grad, rtol=1e-4, atol=1e-6 * max(scale, 10))


def test_the_weights_gradient_is_summed_over_chunks_in_fp32() -> None:
    """Summed in bf16 the error would be 1.5 % of the largest number, five times as much."""
    hidden, weight, targets = sample(1600, torch.bfloat16)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(head_loss(hidden, weight, targets, 1.0, chunk_rows=16), weight)
    exact = weight.detach().double().requires_grad_()
    full = F.cross_entropy(hidden.detach().double() @ exact.T, targets, reduction="sum")
    (full_grad,) = torch.autograd.grad(full, exact)
    scale = float(full_grad.abs().max())
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), full_grad, rtol=0, atol=6e-3 * scale)


def test_bf16_is_within_its_rounding_of_fp32() -> None:
    hidden, weight, targets = sample(300, torch.bfloat16)
    mine = head_loss(hidden, weight, targets, 1.0)
    (grad,) = torch.autograd.grad(mine, hidden)
    exact_hidden = hidden.detach().float().requires_grad_()
    full = F.cross_entropy(exact_hidden @ weight.float().T, targets, reduction="sum")
    (full_grad,) = torch.autograd.grad(full, exact_hidden)
    assert mine.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(mine, full, rtol=5e-3, atol=0)
    torch.testing.assert_close(grad.float(), full_grad, rtol=0.05, atol=0.05)


class Watch(TorchDispatchMode):
    """Notes the largest tensor, and the most bytes of logits (16, 50) that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.logits: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.largest = max(self.largest, made.numel())
            if made.shape == (16, 50):
                storage = made.untyped_storage()
                self.logits[weakref.ref(storage)] = storage.nbytes()
        there = (size for storage, size in self.logits.items() if storage() is not None)
        self.most = max(self.most, sum(there))
        return made


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_full_logits_are_never_made(trained: bool) -> None:
    """The largest tensor made on the way has a chunk's rows, in forward and in backward."""
    hidden, weight, targets = sample(160)
    weight.requires_grad_(trained)
    with Watch() as watch:
        head_loss(hidden, weight, targets, 1.0, chunk_rows=16).backward()
    assert watch.largest == hidden.numel() < 160 * 50


def test_a_chunks_logits_go_before_the_next_ones_come() -> None:
    """In bf16 as they are computed, and in fp32: 6 bytes each, as the plan has it."""
    hidden, weight, targets = sample(160, torch.bfloat16)
    for loss in (lambda: head_loss(hidden, weight, targets, 1.0, 16),
                 lambda: head_scores(hidden.detach(), weight, targets, 16)):  # fmt: skip
        with Watch() as watch:
            loss()
        assert watch.most == 16 * 50 * 6


def test_no_labelled_row_gives_zero_and_no_gradient() -> None:
    hidden, weight, targets = sample(0)
    total = head_loss(hidden, weight, targets, 1.0)
    total.backward()
    assert total.item() == 0.0 and hidden.grad.shape == (0, 24)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight, targets = sample(8)
    total = head_loss(hidden * 1e4, weight, targets, 1.0)
    (grad,) = torch.autograd.grad(total, hidden)
    assert total.isfinite() and grad.isfinite().all()
