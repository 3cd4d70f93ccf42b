"""Names of adapters' loads, by which the engine and all its hosts know them."""


def source_of(number: int, path: str) -> str:
    return f"{number} {path}"


def path_of(source: str) -> str:
    return source.partition(" ")[2]
