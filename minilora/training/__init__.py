"""Training: the loop, the engine, and a run from start to end. Start with loop.py."""
