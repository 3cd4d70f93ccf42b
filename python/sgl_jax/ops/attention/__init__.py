"""Paged, ragged attention: `api` is the contract, `reference` what it means, the other modules implementations."""
