"""Attention for TPU: Pallas kernels over the paged pool.

`call` is the implementation of the contract, `decode` and `chunks` its two kernels, `ring` the copies of pages that both
share, `blocks` the sizes.
"""
