"""Memory banks of patch features: which patches enter, which of them are kept, how they are searched."""
