"""What train.py and the commands call: a run's settings, folder, progress, scores and ends."""
