"""From samples to a model folder."""
