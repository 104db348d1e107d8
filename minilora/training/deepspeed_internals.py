"""What of DeepSpeed is private (to be filled)."""
