"""Models in production: exported to files that run without this project, or served online."""
