"""The model against transformers and PEFT: logits and every LoRA gradient, elementwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minilora.files.model_config import read_model_config, shape_from_config
from minilora.model.llama import Llama
from minilora.model.lora import LoraLinear, inject, lora_parameters
from minilora.model.lora_shape import LoraShape
from minilora.model.rope import rotation
from tests.support.models import LLAMA3_ROPE, ours, random_llama, tiles_of
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


@pytest.mark.parametrize("rope", [LLAMA3_ROPE, {"rope_type": "default", "rope_theta": 2e6}])
def test_rotation_in_all_three_bands_equals_transformers(rope: dict[str, object]) -> None:
    theirs = random_llama(head_dim=64, rope_parameters=rope)
    shape = shape_from_config(theirs.config.to_dict())
    positions = torch.cat(
        [torch.arange(0, 64), torch.arange(8190, 8260), torch.arange(131000, 131072)]
    )
    for dtype in (torch.float32, torch.bfloat16):
        like = torch.zeros(1, dtype=dtype)
        cos, sin = LlamaRotaryEmbedding(theirs.config)(like, positions[None])
        mine = rotation(shape.rope, shape.head_dim, positions, dtype)
        torch.testing.assert_close(mine[0][:, 0], cos[0], rtol=0, atol=0)
        torch.testing.assert_close(mine[1][:, 0], sin[0], rtol=0, atol=0)


def test_injection_changes_no_output_and_no_name() -> None:
    model = ours(random_llama())
    names = {name for name, _ in model.named_parameters()}
    ids = torch.randint(0, 128, (20,))
    with torch.no_grad():
        before = model.logits(ids, tiles_of(model, (20,)))
        inject(model, LoraShape(4, 8, 0.0, ("q_proj", "down_proj")), seed=0)
        after = model.logits(ids, tiles_of(model, (20,)))
    assert torch.equal(before, after)
    added = {name for name, _ in model.named_parameters()} - names
    assert names < {name for name, _ in model.named_parameters()}
    assert added == {
        f"model.layers.{layer}.{module}.lora_{ab}"
        for layer in (0, 1)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for ab in "AB"
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


def test_lora_a_is_kaiming_uniform_and_depends_on_seed_and_name_alone() -> None:
    def start(seed: int, **changes: object) -> dict[str, Tensor]:
        model = ours(random_llama(hidden_size=256, **changes))
        inject(model, LoraShape(8, 16, 0.0, TARGETS), seed)
        return {name: parameter.data for name, parameter in lora_parameters(model)}

    first, second, other = start(3), start(3, num_hidden_layers=1), start(4)
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name])
    a = first["model.layers.0.self_attn.q_proj.lora_A"]
    bound = 256**-0.5
    assert 0.98 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.05 * bound
    assert not torch.equal(a, other["model.layers.0.self_attn.q_proj.lora_A"])
    assert not torch.equal(a, first["model.layers.1.self_attn.q_proj.lora_A"])
    assert not torch.equal(a[:, :32], first["model.layers.0.self_attn.k_proj.lora_A"][:, :32])
    assert all(not tensor.any() for name, tensor in first.items() if name.endswith("lora_B"))


def test_only_targeted_layers_become_lora() -> None:
    model = ours(random_llama())
    inject(model, LoraShape(2, 4, 0.0, ("v_proj",)), seed=0)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert found == {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"}


def test_a_checkpoint_on_disk_gives_transformers_logits(tiny: Path, tiny_tied: Path) -> None:
    from minilora.files.weights import TensorPart, read_checkpoint, read_parts

    for folder in (tiny, tiny_tied):
        checkpoint = read_checkpoint(read_model_config(folder))
        model = Llama(checkpoint.shape)
        pieces = [TensorPart(n, 0, p.data.view(-1)) for n, p in model.named_parameters()]
        assert read_parts(checkpoint, pieces) == checkpoint.total_bytes
        ids = torch.randint(0, checkpoint.shape.vocab_size, (25,))
        with torch.no_grad():
            mine = model.logits(ids, tiles_of(model, (25,)))
            expected = base_model(folder)(ids[None]).logits[0]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
