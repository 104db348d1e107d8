"""LoRA fine-tuning of Llama models with DeepSpeed ZeRO-3, small enough to read in an afternoon.

Begin with `training/loop.py`, whose first function is one optimizer step from top to bottom. From
there the code goes down to the tensors:

    training/   the loop, the engine that hands the model to DeepSpeed, a run from start to end
    model/      Llama, LoRA, recomputation and the loss: plain torch, no files
    data/       rows of files, conversations, tokens, and which rank computes which of them
    files/      base weights, adapters and snapshots on the disk

That is the heart. The rest can be skipped at first:

    memory/     the memory plan: what a run needs, worked out before it starts
    processes/  how the processes of a run join, watch each other, and stop
    report/     progress bar, log and pictures
    settings/   every setting, and how it is read and checked
    tiny/       a checkpoint that is small enough for a CPU, for the demo and the tests

The files beside the folders are the commands: train, generate, merge, plan, preview, plot.

Five words name runs of tokens, from large to small. The numbers are those of one example:

    step    all tokens of one rank in one optimizer step                              32,768
    span    tokens that share one gather of each block's weights, and so one
            micro-step of DeepSpeed; by default all of the step (`gather_tokens`)      8,192
    tile    whole documents of a span that a block computes at one time
            (`tile_tokens`)                                                            2,048
    piece   tokens of a tile that the MLP computes at one time: all of them, unless
            one document is longer than `tile_tokens`                                  2,048
    chunk   labelled tokens of a span whose logits exist at one time (`loss_tokens`)   1,024
"""

__version__ = "0.1.0"
