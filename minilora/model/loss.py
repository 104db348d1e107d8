"""Language-model head and cross-entropy in chunks of tokens: full logits never exist."""

# Shape letters: N tokens, D model, V vocabulary.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 1024 rows of Llama 3's 128256 logits are 0.25 GiB in bf16 and 0.5 GiB in fp32, both at a time.
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
            losses, sums = _cross_entropy(logits, target)
            total += losses.sum()
            if wants_hidden or wants_weight:
                # d loss / d logits = softmax - one_hot(target), in the buffer of the logits.
                logits.mul_(scale / sums)
                logits.scatter_add_(1, target, torch.full_like(sums, -scale))
                logits = logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = logits @ weight
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows]
            del logits  # or they would be there still while the next chunk is made
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


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N, 1) of logits (N, V) in fp32 against targets (N, 1).

    The logits become their exponentials, of which the second result is the sum, (N, 1): torch's
    own logsumexp would take another buffer of that size.
    """
    logits -= logits.amax(-1, keepdim=True)
    right = logits.gather(1, target)
    sums = logits.exp_().sum(-1, keepdim=True)
    return sums.log() - right, sums


def head_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Sum of the cross-entropy, and how many targets are the likeliest token: (2,) fp32.

    The arguments are those of `head_loss`; no gradient.
    """
    scores = torch.zeros(2, dtype=torch.float32, device=hidden.device)
    for rows, target in zip(
        torch.split(hidden, chunk_rows), torch.split(targets, chunk_rows), strict=True
    ):
        logits = (rows @ weight.T).float()  # (chunk, V)
        scores[1] += (logits.argmax(-1) == target).sum()
        scores[0] += _cross_entropy(logits, target[:, None])[0].sum()
        del logits
    return scores
