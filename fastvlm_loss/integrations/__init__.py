"""The losses in other people's training code; each module needs its package, and nothing here is imported for you."""
