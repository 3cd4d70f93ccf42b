"""Every flag of a launch, how it is read, and where models are found."""
