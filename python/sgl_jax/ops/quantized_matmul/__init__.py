"""Products of groups of rows with a matrix each: the experts of a mixture."""
