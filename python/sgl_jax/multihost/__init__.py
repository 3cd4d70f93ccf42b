"""Several hosts as one engine: how their processes find, check, drive and watch each other. Knows nothing of models."""
