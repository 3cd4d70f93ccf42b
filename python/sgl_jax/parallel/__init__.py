"""Many devices as one: the mesh, where arrays lie on it, and the collectives of a step."""
