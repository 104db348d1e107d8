"""What a run shows and leaves behind: its log, its results and its picture."""
