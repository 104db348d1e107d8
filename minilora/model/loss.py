"""Language-model head and cross-entropy in chunks of tokens: full logits never exist."""

# Shape letters: N tokens, n tokens of a chunk, D model, V vocabulary.

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
    many rows' logits exist at one time. Returns a scalar in fp32.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, scale, chunk_rows
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """The loss, whose gradients are computed in forward, while a chunk's logits exist.

    Backward would have to compute the logits a second time, or to find all of them saved. But the
    loss is the last function of the model, so its incoming gradient is one number, and backward
    can multiply finished gradients with that. The weight's gradient (wanted only where the head is
    trained) is summed over chunks in fp32.
    """

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
            target = targets[rows, None]  # (n, 1)

            # Computed in the dtype of hidden, then fp32 for the softmax. From here on one buffer
            # of fp32 holds first the logits, then their exponentials, then the gradient.
            logits = (hidden[rows] @ weight.T).float()  # (n, V)
            losses, sums = _cross_entropy(logits, target)
            total += losses.sum()

            if wants_hidden or wants_weight:
                # The loss of a row is log(sum of exponentials) - logit of the target. So its
                # gradient with respect to the logits is the softmax, exponential / sum, and 1 less
                # at the target: softmax - one_hot(target). All of it is multiplied with scale.
                logits.mul_(scale / sums)
                logits.scatter_add_(1, target, torch.full_like(sums, -scale))

                # Chain rule through logits = hidden @ weight.T, in the dtype of hidden again.
                # The name is reused, so that the fp32 buffer is free before the products.
                logits = logits.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = logits @ weight  # (n, D)
                if grad_weight is not None:
                    grad_weight += logits.T @ hidden[rows]  # (V, D)

            # Otherwise this chunk's would still exist while the next one's are computed.
            del logits

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_output.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N, 1) of logits (N, V) in fp32 against targets (N, 1), and sums (N, 1).

    In place: the logits become their exponentials, and the sums are those of a row's exponentials.
    torch's own logsumexp would take another buffer of that size.
    """
    # Less the largest of each row, which cancels in the loss: exp of a large logit is infinite.
    logits -= logits.amax(-1, keepdim=True)
    of_target = logits.gather(1, target)
    sums = logits.exp_().sum(-1, keepdim=True)
    return sums.log() - of_target, sums


def head_scores(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
    """Sum of the cross-entropy, and how many targets are the likeliest token: (2,) fp32.

    The arguments are those of `head_loss`; no gradient.
    """
    scores = torch.zeros(2, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), chunk_rows):
        rows = slice(start, start + chunk_rows)
        target = targets[rows, None]  # (n, 1)
        logits = (hidden[rows] @ weight.T).float()  # (n, V)

        # The likeliest tokens first: the loss is computed in the buffer of the logits.
        scores[1] += (logits.argmax(-1, keepdim=True) == target).sum()
        losses, _ = _cross_entropy(logits, target)
        scores[0] += losses.sum()
        del logits  # before the next chunk's are computed
    return scores
