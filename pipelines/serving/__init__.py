"""Models in use outside of jobs: served over HTTP."""
