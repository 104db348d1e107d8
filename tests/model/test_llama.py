"""The model against transformers and PEFT: logits and every LoRA gradient, elementwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import read_checkpoint, read_parts
from minilora.model.llama import Llama
from minilora.model.lora import inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from tests.support.models import ours, random_llama, tiles_of
from tests.support.oracle import TARGETS, base_model, document_loss_sum, ours_to_peft, with_lora


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 8, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
    ids=["llama3.1", "tied", "biases", "one kv head", "plain rope"],
)
def test_logits_equal_transformers(changes: dict[str, object]) -> None:
    theirs = random_llama(**changes)
    model = ours(theirs)
    documents = [torch.randint(0, 128, (length,)) for length in (1, 9, 30, 17)]
    with torch.no_grad():
        mine = model.logits(torch.cat(documents), tiles_of(model, (1, 9), (30, 17)))
        expected = torch.cat([theirs(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_logits_and_gradients_beyond_8192_positions() -> None:
    theirs = random_llama(num_hidden_layers=1)
    model = ours(theirs)
    document = torch.randint(0, 128, (8300,))
    labels = torch.full((8300,), -100)
    labels[8200:8290] = document[8201:8291]
    check_gradients(theirs, model, [(document, labels)], tiles_of(model, (8300,)))


def check_gradients(
    theirs: LlamaForCausalLM,
    model: Llama,
    documents: list[tuple[Tensor, Tensor]],
    tiles: list,
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


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_every_lora_gradient_equals_peft(changes: dict[str, object]) -> None:
    theirs = random_llama(**changes)
    model = ours(theirs)
    documents = []
    for length in (5, 40, 12, 3):
        ids = torch.randint(0, 128, (length,))
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[: length // 3] = -100
        documents.append((ids, labels))
    check_gradients(theirs, model, documents, tiles_of(model, (5,), (40, 12), (3,)))


def test_a_checkpoint_on_disk_gives_transformers_logits(tiny: Path, tiny_tied: Path) -> None:
    for folder in (tiny, tiny_tied):
        checkpoint = read_checkpoint(read_model_config(folder))
        model = Llama(checkpoint.shape)
        parts = [TensorPart(n, 0, p.data.view(-1)) for n, p in model.named_parameters()]
        assert read_parts(checkpoint, parts) == checkpoint.total_bytes
        ids = torch.randint(0, checkpoint.shape.vocab_size, (25,))
        with torch.no_grad():
            mine = model.logits(ids, tiles_of(model, (25,)))
            expected = base_model(folder)(ids[None]).logits[0]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
