"""Measurements of minilora beside transformers and PEFT; never imported by the package."""
