"""Rows of files become conversations, these become tokens, and these become optimizer steps.

In the order of reading:

prepare         goes the whole way from the settings to tokenised documents.
sources         finds the files behind the names of datasets, and reads their rows.
datasets        makes conversations of the rows of all datasets, and counts those it cannot use.
conversations   makes a conversation of one row, in any of four formats.
chat            makes tokens of conversations, says which are trained, and cuts what is too long.
chat_templates  writes a conversation as text, by the checkpoint's own template or by llama3.
named_templates does so by LLaMA-Factory's qwen, qwen3 and mistral.
tokenizer       makes tokens of that text, with special tokens only where the template wrote them.
documents       keeps the tokens of all documents end to end, in files that processes share.
schedule        decides which documents belong to which optimizer step.
steps           deals a step's documents out to the ranks, and cuts them into spans and tiles.

prompts serves minilora.generate: it makes tokens of what is asked. tokenizer_files reads the files
of the tokenizer, once for the tokens and for the copies beside each adapter.

Up to documents everything happens once, in one process per machine, before the training. schedule
and steps work in every process, at every step.
"""
