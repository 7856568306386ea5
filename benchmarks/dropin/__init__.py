"""Other packages' own training loops, with and without our losses: the same seeds, the loss of every step."""
