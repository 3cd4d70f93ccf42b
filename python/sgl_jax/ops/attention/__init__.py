"""Paged, ragged attention: `api` is the contract, `reference` defines its results, the others implement it."""
