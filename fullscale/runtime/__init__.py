"""Base of all programs: errors, events, files, locks, signals, processes, console, progress."""
