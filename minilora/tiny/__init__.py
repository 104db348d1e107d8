"""A checkpoint in Llama 3.1's form that is small enough for a CPU."""
