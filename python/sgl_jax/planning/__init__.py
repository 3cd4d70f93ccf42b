"""What a launch would need and cost on devices that may not be here: arithmetic, and compiling ahead of time."""
