"""What the fork server of the tests imports before it forks anything: see forked.py."""

from __future__ import annotations

import gc
import os

# As minilora.train does before it imports torch: its log is silent where a connection ends.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch._dynamo  # noqa: F401  torch's optimizers import it, which takes seconds

import minilora.training.run  # noqa: F401

gc.freeze()  # DeepSpeed collects garbage each time it starts, and none of this is any
