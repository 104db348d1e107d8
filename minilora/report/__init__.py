"""What a run shows and leaves behind: its log, its results and its pictures.

run_log  progress bar, trainer_log.jsonl and train_results.json of one run
curves   logs read back, and drawn: one run's loss, or several runs side by side
"""
