"""A checkpoint in Llama 3.1's form, small enough for a CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minilora.files.model_config import shape_from_config
from minilora.settings.errors import RequestError
from minilora.settings.text_files import read_json
from minilora.tiny.tokenizer import CHAT_TEMPLATE, train_tokenizer

# config.json's _name_or_path, by which write_tiny knows the folders that it may write over.
MARK = "minilora-tiny"

# Llama-3.1-8B-Instruct's, from its config.json.
ROPE_THETA = 500000.0
ROPE_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@dataclass(frozen=True)
class TinyShape:
    """What the checkpoint looks like; the default is the demo's.

    vocab: tokens, special ones included. shard_bytes: most bytes of tensors in one file.
    form: "hub" writes config.json as the hub has it, "transformers5" as transformers 5 does.
    """

    hidden: int = 128
    intermediate: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 512
    dtype: str = "bfloat16"
    tied: bool = False
    seed: int = 0
    shard_bytes: int = 400_000
    form: str = "hub"


def write_tiny(folder: Path | str, shape: TinyShape = TinyShape()) -> None:
    """Write a checkpoint with random weights; the same shape gives the same bytes.

    The weights are such that LoRA alone can learn a text by heart.
    Raises RequestError if the folder holds anything but a checkpoint written by this function.
    """
    folder = Path(folder)
    _make_room(folder)

    tokenizer = train_tokenizer(shape.vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}

    # The roles of the special tokens are Llama-3.1-8B-Instruct's.
    stop_names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    special_ids = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids[name] for name in stop_names],
    }
    special_names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}

    config = _config(shape) | special_ids
    files: dict[str, Mapping[str, Any]] = {
        "config.json": config,
        "generation_config.json": {
            **special_ids,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        "special_tokens_map.json": special_names,
        "tokenizer_config.json": {
            **special_names,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }

    shards = _shards(shape, shape_from_config(config).parameter_shapes())
    files |= _write_weights(folder, shards)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _make_room(folder: Path) -> None:
    """Create the folder, or empty it of the weights of an earlier tiny checkpoint."""
    if folder.exists() and not folder.is_dir():
        raise RequestError([f"{folder} is a file: name a folder that is new or empty"])
    folder.mkdir(parents=True, exist_ok=True)

    if any(folder.iterdir()):
        try:
            mark = read_json(folder / "config.json").get("_name_or_path")
        except RequestError:
            mark = None
        if mark != MARK:
            raise RequestError([f"{folder} holds other files: name a new or empty folder"])

    # The other files are written over, but another shape may need fewer shards.
    for old in folder.glob("model*.safetensors*"):
        old.unlink()


def _config(shape: TinyShape) -> dict[str, Any]:
    """config.json without token ids; everything but the sizes is Llama-3.1-8B-Instruct's."""
    rope: dict[str, Any]
    if shape.form == "transformers5":
        rope = {
            "rope_parameters": {**ROPE_SCALING, "rope_theta": ROPE_THETA},
            "dtype": shape.dtype,
        }
    else:
        assert shape.form == "hub", shape.form
        rope = {
            "rope_scaling": ROPE_SCALING,
            "rope_theta": ROPE_THETA,
            "torch_dtype": shape.dtype,
        }

    return {
        "_name_or_path": MARK,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab,
        **rope,
    }


def _shards(
    shape: TinyShape, sizes: Mapping[str, tuple[int, ...]]
) -> list[dict[str, torch.Tensor]]:
    """Random tensors by name, in shards of at most shard_bytes, or of one tensor."""
    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    generator = torch.Generator().manual_seed(shape.seed)

    shards: list[dict[str, torch.Tensor]] = []
    room = 0
    for name, size in sizes.items():
        tensor = _random(name, size, name == head, generator).to(getattr(torch, shape.dtype))
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = shape.shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def _write_weights(folder: Path, shards: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Write a file for each shard. Returns the index by its name; of a single shard there is none.

    The files are named as the hub names them.
    """
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if count == 1:
        return {}

    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {"model.safetensors.index.json": index}


def _random(
    name: str, size: tuple[int, ...], is_head: bool, generator: torch.Generator
) -> torch.Tensor:
    """fp32, uniform: unlike a normal draw that is the same to the last bit on every processor."""
    centred = (torch.rand(size, generator=generator) - 0.5) * math.sqrt(12.0)  # std 1
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * centred
    if is_head:
        # The rows that the final norm returns have length sqrt(hidden), so no logit exceeds about
        # 1.6 * sqrt(hidden), whatever LoRA learns: enough for confident answers.
        return centred * 1.6 / math.sqrt(size[1])
    if name == "model.embed_tokens.weight":
        return centred
    return centred / math.sqrt(size[1])
