"""One comparison with PEFT: losses, logits and every LoRA gradient of documents in tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.tiles import DocumentTile
from tests.support.oracle import TARGETS, document_loss_sum, ours_to_peft, with_lora


def labelled_documents(lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of random documents, the first third of each without labels."""
    documents = []
    for length in lengths:
        ids = torch.randint(0, 128, (length,))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[: length // 3] = -100
        documents.append((ids, labels))
    return documents


def check_gradients(
    theirs: PreTrainedModel,
    model: Llama,
    documents: list[tuple[Tensor, Tensor]],
    tiles: list[DocumentTile],
) -> None:
    """Losses, logits and every LoRA gradient of ours equal PEFT's on the same random adapter."""
    peft = with_lora(theirs, rank=4, alpha=12)
    inject(model, LoraShape(4, 12, 0.0, TARGETS), seed=0)
    generator = torch.Generator().manual_seed(1)
    their_parameters = dict(peft.named_parameters())
    for name, parameter in lora_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        their_parameters[ours_to_peft(name)].data.copy_(parameter.data)
    token_ids = torch.cat([ids for ids, _ in documents])
    labels = torch.cat([labels for _, labels in documents])
    loss = model(token_ids, labels, tiles, scale=0.5)
    loss.backward()
    expected = sum(document_loss_sum(peft, *document) for document in documents) * 0.5
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in lora_parameters(model)]
    assert len(names) == 2 * 7 * model.shape.num_layers
    for name, parameter in lora_parameters(model):
        theirs_grad = their_parameters[ours_to_peft(name)].grad
        assert theirs_grad.abs().max() > 1e-4, f"{name}: the comparison would show nothing"
        scale = float(theirs_grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, theirs_grad, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: n + m
        )
    with torch.no_grad():
        mine = model.logits(token_ids, tiles)
        logits = torch.cat([peft(ids[None]).logits[0] for ids, _ in documents])
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=2e-5 * float(logits.abs().max()))
