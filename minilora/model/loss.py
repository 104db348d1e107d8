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

    hidden: (N, D); weight: (V, D); targets: (N,) int64, every one a real token; chunk_rows: how
    many rows' logits exist at one time. Returns a scalar in fp32. The gradients of hidden, and of
    the weight where it is trained, are taken in forward, while a chunk's logits are there: the
    loss is last, so backward needs nothing else. The weight's is summed over chunks in fp32.
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
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = (hidden[rows] @ weight.T).float()  # (chunk, V)
            target = targets[rows, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if wants_hidden or wants_weight:
                # d loss / d logits = softmax - one_hot(target), in the buffer of the logits.
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                grad = grad.mul_(scale).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ weight
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = (grad if grad is None else grad * grad_output.to(grad.dtype) for grad in saved)
        return *grads, None, None, None


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
