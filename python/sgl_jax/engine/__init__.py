"""The engine: commands in, tokens out. `core` steps it, `loop` drives it, `service` speaks text to it."""
