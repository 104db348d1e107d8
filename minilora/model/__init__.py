"""The model in plain torch, without files and without DeepSpeed.

In the order of reading:

llama: the model itself, from the linear layer up to the loss.
recompute: what a block saves for backward, and what it recomputes.
linear, lora: the linear layer with its backward by hand, and what LoRA makes of it.
loss: head and cross-entropy, without ever making all logits.
attention, rope, swiglu: the functions within a block.
tiles, dropout, offload: the rows computed at one time, the seeds of masks, inputs in host memory.
llama_shape, lora_shape: sizes and names, as arithmetic.
decode: answers token by token.
"""
