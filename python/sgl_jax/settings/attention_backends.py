"""Names of the attention backends, known before jax is imported."""

GROUP = "sgl_jax.attention"  # entry points by which installed packages bring a backend
_OURS = ("native", "cpu", "fa")


def about_unknown(name: str | None) -> str:
    """Say that no backend has the name, and which there are. Empty: one has it, or none is named."""
    if name is None or name in _OURS:
        return ""
    from importlib import metadata

    brought = sorted(point.name for point in metadata.entry_points(group=GROUP))
    if name in brought:
        return ""
    others = f", and {', '.join(brought)} of installed packages" if brought else ""
    return f"--attention-backend is {name}; there are native, for every device, cpu and fa, for CPU and TPU{others}"
