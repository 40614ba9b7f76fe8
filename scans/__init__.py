"""CT scans on disk: reading, checking, ingesting, slicing, storing and simulating them. No torch."""
