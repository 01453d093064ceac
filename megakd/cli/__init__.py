"""Commands of `python -m megakd` and the launcher that starts ranks."""
