"""The run: the DeepSpeed engine, the training loop, memory and the log."""
