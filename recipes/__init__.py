"""Short Lightning recipes: ``python -m recipes NAME``, with the settings of ``configs/NAME.yaml``."""
