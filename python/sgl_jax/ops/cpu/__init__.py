"""Operations on CPUs in a library that is compiled when the package is installed."""
