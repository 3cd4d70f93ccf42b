"""Plans of launches on devices that may not be here: memory and cost by arithmetic, and compiling ahead of time."""
