"""CT on disk: read, write, geometry, cohort, slice store. No torch."""
