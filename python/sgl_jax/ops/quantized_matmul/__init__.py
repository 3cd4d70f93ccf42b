"""Products with quantised matrices: the contract, plain XLA, the library for CPUs and a kernel for TPU."""
