"""Products of tokens with a matrix of weights."""
