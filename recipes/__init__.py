"""The commands: python -m recipes.NAME --help."""
