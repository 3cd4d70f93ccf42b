"""How the files of quantised checkpoints hold matrices: a file for each family of formats, found by config.json."""
