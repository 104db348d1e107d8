"""The model against transformers and PEFT: logits and every LoRA gradient, elementwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minilora.files.model_config import read_model_config
from minilora.files.tensor_parts import TensorPart
from minilora.files.weights import read_checkpoint, read_parts
from minilora.model.llama import Llama
from tests.support.models import ours, random_llama, tiles_of
from tests.support.oracle import base_model
from tests.support.peft_gradients import check_gradients, labelled_documents


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


@pytest.mark.slow
def test_logits_and_gradients_beyond_8192_positions() -> None:
    theirs = random_llama(num_hidden_layers=1)
    model = ours(theirs)
    document = torch.randint(0, 128, (8300,))
    labels = torch.full((8300,), -100)
    labels[8200:8290] = document[8201:8291]
    check_gradients(theirs, model, [(document, labels)], tiles_of(model, (8300,)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_every_lora_gradient_equals_peft(changes: dict[str, object]) -> None:
    theirs = random_llama(**changes)
    model = ours(theirs)
    documents = labelled_documents((5, 40, 12, 3))
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
