"""What a model takes and whether it fits: the plan before load, the checks at start."""
