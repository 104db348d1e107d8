"""The families of models that are trained, by `model_type` of config.json, and those that are not.

Each family is the same model with some things added or left out. Some of it stands in config.json.
What a file leaves unsaid is here, as in transformers: in its folder models/FAMILY, by the defaults
of configuration_FAMILY.py and by the layers that modeling_FAMILY.py makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from minilora.model.llama_shape import LlamaShape

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What models of one `model_type` have in common, and what their config.json may leave out.

    biased: layers that have a bias whatever config.json says. bias_flags: keys that give a bias to
    the layers behind them. qk_norm: see `LlamaShape`. head_dim: None for hidden_size divided by
    the attention heads. kv_heads: None for as many as attention heads. window: the sliding window
    of a file without the key, None for none. window_flag: a key without which the window is not
    in use; "" where it always is.
    """

    biased: tuple[str, ...] = ()
    bias_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    qk_norm: bool = False
    head_dim: int | None = None
    kv_heads: int | None = None
    has_window: bool = False
    window: int | None = None
    window_flag: str = ""


FAMILIES = {
    "llama": Family(bias_flags={"attention_bias": ATTENTION, "mlp_bias": MLP}),
    "qwen2": Family(
        biased=QKV, kv_heads=32, has_window=True, window=4096, window_flag="use_sliding_window"
    ),
    "qwen3": Family(
        bias_flags={"attention_bias": ATTENTION},
        qk_norm=True,
        head_dim=128,
        kv_heads=32,
        has_window=True,
        window=4096,
        window_flag="use_sliding_window",
    ),
    "mistral": Family(kv_heads=8, has_window=True, window=4096),
}

# What others are, by patterns of their model_type; the first one that matches is told.
REFUSED = {
    "*vl": "a model of images and text",
    "*vl_*": "a model of images and text",
    "*omni*": "a model of images, sound and text",
    "*audio*": "a model of sound and text",
    "*asr*": "a model of sound and text",
    "*llava*": "a model of images and text",
    "mllama": "a model of images and text",
    "llama4*": "a mixture of experts for images and text",
    "pixtral": "a model of images and text",
    "mistral3": "a model of images and text",
    "qwen3_next": "made of gated delta net layers (linear attention) and a mixture of experts",
    "qwen3_5*": "made of gated delta net layers (linear attention)",
    "*moe*": "a mixture of experts",
    "mixtral": "a mixture of experts",
    "deepseek_v*": "a mixture of experts",
    "gpt_oss": "a mixture of experts",
    "gemma*": "of another block: more norms, another activation, scaled embeddings",
}
TRAINED = "Llama 3, Qwen2, Qwen2.5, Qwen3 and Mistral are trained, as dense text models"


def why_refused(model_type: object, has_images: bool) -> str:
    """What is wrong with a model_type that is no key of FAMILIES, and what can be trained instead.

    has_images: whether config.json has a part about images.
    """
    for pattern, what in REFUSED.items():
        if isinstance(model_type, str) and fnmatchcase(model_type, pattern):
            return f"it is {what}; {TRAINED}"
    if has_images:
        return f"it is a model of images and text; {TRAINED}"
    return f"it is not known; {TRAINED} (model_type {', '.join(FAMILIES)})"


def window_problem(shape: LlamaShape, longest: int, key: str) -> list[str]:
    """A line if documents of `longest` tokens, which `key` allows, exceed the attention's window.

    Attention over a window is the same as over all tokens as long as no document is longer.
    """
    if shape.window is None or longest <= shape.window:
        return []
    return [
        f"{key}: {longest:,} tokens exceed the {shape.window:,} that this model's attention sees "
        f"(sliding_window of config.json), and windows are not computed here; lower {key}"
    ]
