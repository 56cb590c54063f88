"""What `train.py` calls: settings, precision, schedules, scores, checkpoints, tracking."""
