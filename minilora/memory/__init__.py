"""The memory plan: what a run needs, worked out before it starts, and what it really took."""
