"""What lives and dies together: the units of a network."""
