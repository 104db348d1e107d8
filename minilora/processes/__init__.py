"""The processes of a run: how they join, watch each other, and stop."""
