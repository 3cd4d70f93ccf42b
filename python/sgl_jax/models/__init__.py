"""One decoder for all models; a small file per family translates its config.json and tensor names."""
