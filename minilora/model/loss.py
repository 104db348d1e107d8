"""Language-model head and cross-entropy in chunks of tokens: full logits never exist."""

# Shape letters: N tokens, D model, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# 1024 rows of Llama 3's 128256 logits are 0.25 GiB in bf16 and 0.5 GiB in fp32.
CHUNK_ROWS = 1024


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T` against `targets`, times `scale`.

    hidden: (N, D); weight: (V, D), frozen; targets: (N,) int64, every one a real token;
    chunk_rows: how many rows' logits exist at one time. Returns
    a scalar in fp32. The gradient with respect to hidden is taken in forward, while a chunk's
    logits are there: the head is frozen and the loss is last, so backward needs nothing else.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, scale, chunk_rows
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_rows: int
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if wants_grad else hidden.new_empty(0)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden[rows] @ weight.T).float()  # (chunk, V)
            target = targets[rows, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if wants_grad:
                # d loss / d logits = softmax - one_hot(target), in the buffer of the logits.
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad_hidden[rows] = grad.mul_(scale).to(hidden.dtype) @ weight
        ctx.save_for_backward(grad_hidden)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_output.to(grad_hidden.dtype), None, None, None, None


def head_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Sum of the cross-entropy, and how many targets are the likeliest token: (2,) fp32.

    The arguments are those of `head_loss`; no gradient.
    """
    scores = torch.zeros(2, dtype=torch.float32, device=hidden.device)
    for rows, target in zip(
        torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True
    ):
        logits = (rows @ weight.T).float()  # (chunk, V)
        scores[0] += F.cross_entropy(logits, target, reduction="sum")
        scores[1] += (logits.argmax(-1) == target).sum()
    return scores
