"""A score matrix as a value (`problem`), and what can be asked of it (`statistics`)."""
