"""One file per primitive, all in the same order; see ``_registry.py`` for the contract."""
