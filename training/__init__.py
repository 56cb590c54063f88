"""The code behind train.py and the commands: a run's settings, folder, progress and scores."""
