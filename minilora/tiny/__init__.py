"""A checkpoint in Llama 3.1's form that is small enough for a CPU: `python -m minilora.tiny DIR`.

checkpoint  config.json, random weights in several shards, and what else a checkpoint has
tokenizer   its tokenizer and its chat template
"""
