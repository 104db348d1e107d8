"""What happens between steps (to be filled)."""
