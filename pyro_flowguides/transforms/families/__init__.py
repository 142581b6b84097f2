"""One file per family of transforms."""
