"""CT scans on disk: reading, checking, ingesting, slicing, storing, simulating. No torch."""
