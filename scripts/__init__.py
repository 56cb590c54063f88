"""Users' commands: ``python scripts/NAME.py --help``."""
