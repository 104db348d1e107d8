"""The tiny checkpoint's tokenizer and chat template, in Llama 3.1's form."""

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
BYTES = 256  # the alphabet of a byte-level vocabulary

# How Llama 3 splits text before merging bytes (llama-models, tokenizer.py).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the byte pairs are merged from.
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

# Written for this project; renders what Llama 3.1 Instruct's own template renders.
CHAT_TEMPLATE = r"""
{%- macro open(role) %}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{% endmacro %}
{%- macro functions() %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument' }}
    {{- " name and its value}.Do not use variables.\n\n" }}
    {%- for tool in available %}{{ tool | tojson(indent=4) ~ "\n\n" }}{% endfor %}
{%- endmacro %}
{%- set available = custom_tools if custom_tools is defined else tools | default(none) %}
{%- set told_to_user = tools_in_user_message | default(true) %}
{%- set system = "" %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}

{{- bos_token ~ open("system") }}
{%- if builtin_tools is defined or available is not none %}{{ "Environment: ipython\n" }}{% endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " ~ builtin_tools | reject("equalto", "code_interpreter") | join(", ") ~ "\n\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " ~ date_string | default("26 Jul 2024") ~ "\n\n" }}
{%- if available is not none and not told_to_user %}
    {{- "You have access to the following functions. To call a function, please respond with " }}
    {{- "JSON for a function call." ~ functions() }}
{%- endif %}
{{- system ~ "<|eot_id|>" }}

{%- if available is not none and told_to_user %}
    {%- if not messages %}
        {{- raise_exception("Tools are described in the first user message, and there is none") }}
    {%- endif %}
    {{- open("user") ~ "Given the following functions, please respond with a JSON for a " }}
    {{- "function call with its proper arguments that best answers the given prompt.\n\n" }}
    {{- functions() }}
    {{- messages[0].content | trim ~ "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}

{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- open("assistant") }}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- "<|python_tag|>" ~ call.name ~ ".call(" }}
            {%- for name, value in call.arguments | items %}
                {{- name ~ '="' ~ value ~ '"' ~ ("" if loop.last else ", ") }}
            {%- endfor %}
            {{- ")" }}
        {%- else %}
            {{- '{"name": "' ~ call.name ~ '", "parameters": ' ~ call.arguments | tojson ~ "}" }}
        {%- endif %}
        {{- "<|eom_id|>" if builtin_tools is defined else "<|eot_id|>" }}
    {%- elif message.role in ("tool", "ipython") %}
        {{- open("ipython") ~ message.content | tojson ~ "<|eot_id|>" }}
    {%- else %}
        {{- open(message.role) ~ message.content | trim ~ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ open("assistant") }}{% endif %}
"""


def train_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE of vocab - len(SPECIAL_TOKENS) tokens, then the special ones, as Llama 3."""
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
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    smallest, largest = BYTES + len(SPECIAL_TOKENS), tokenizer.get_vocab_size()
    if not smallest <= vocab <= largest:
        raise ValueError(f"vocab {vocab}: from {smallest} to {largest} is possible")
    tokenizer.decoder = decoders.ByteLevel()
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A {bos}:1 $B:1",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    return tokenizer
