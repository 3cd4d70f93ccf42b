"""Many devices as one: the mesh, where arrays lie on it, and what the devices say to each other inside a step."""
