"""The memory plan: what a run needs, worked out before it starts, and what it really took.

In the order of reading: job (what memory depends on), zero3_gathers (which weights are there when),
terms, block, gradients and alive (which tensors are there when), peak (the moment with the most),
traffic (what the ranks send each other), ways (other settings, and which to name), comparison (a
table of them), spare (what a run decides by itself), in_a_run and measured (what a run says of it).
"""
