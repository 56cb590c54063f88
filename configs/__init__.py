"""The settings of a run: YAML files for Hydra, and their types in `configs.schema`."""
