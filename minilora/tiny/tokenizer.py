"""The tiny checkpoint's tokenizer and chat template, in Llama 3.1's form."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

# Names, order and roles of Llama 3.1's first special tokens (llama-models, tokenizer.py).
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in """
    begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1
    finetune_right_pad_id reserved_special_token_2 start_header_id end_header_id eom_id eot_id
    python_tag
    """.split()
)
BYTES = 256  # the tokens that a byte-level vocabulary begins with

# How Llama 3 splits text before merging bytes (llama-models, tokenizer.py).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The text from which the merges are learned. Another text would change every token of the demo.
TEXT = """\
minilora trains small LoRA adapters for Llama models with DeepSpeed. ZeRO-3 splits the base weights
over all GPUs, and every block is gathered once in each direction. The base weights stay frozen;
only the two small matrices A and B of each linear layer learn. What does a tile hold? A run of
whole documents. How many tokens fit? As many as the memory plan says. You are a helpful assistant.
Answer in one short sentence. Who wrote this? What is the answer? Where does the adapter lie? It
lies in the output folder. When is a snapshot written? After every few steps. Why is there no
padding? Because the rows are one flat run of tokens. Today Date: 26 Jul 2024.
Cutting Knowledge Date: December 2023.
system user assistant tool ipython function call parameters name value Environment yes no true false
"""

# Renders what Llama 3.1 Instruct's own template renders for messages without tools.
CHAT_TEMPLATE = r"""
{%- macro open(role) %}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{% endmacro %}

{{- bos_token ~ open("system") }}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " ~ date_string | default("26 Jul 2024") ~ "\n\n" }}
{%- if messages[0].role == "system" %}
    {{- messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if message.role in ("tool", "ipython") or message.tool_calls is defined %}
        {{- raise_exception("the tiny checkpoint's chat template knows no tools") }}
    {%- endif %}
    {{- open(message.role) ~ message.content | trim ~ "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ open("assistant") }}{% endif %}
"""


def train_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE with `vocab` tokens; as in Llama 3, the last ones are SPECIAL_TOKENS.

    Raises ValueError if the text is too short for so many merges, or vocab too small for the bytes.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL_TOKENS),
        show_progress=False,
        # Sorted, because the order of the alphabet decides the ids.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])

    smallest = BYTES + len(SPECIAL_TOKENS)
    largest = tokenizer.get_vocab_size()
    if not smallest <= vocab <= largest:
        raise ValueError(f"vocab {vocab}: from {smallest} to {largest} is possible")

    tokenizer.decoder = decoders.ByteLevel()
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin} $A",
                pair=f"{begin} $A {begin}:1 $B:1",
                special_tokens=[(begin, tokenizer.token_to_id(begin))],
            ),
        ]
    )
    return tokenizer
