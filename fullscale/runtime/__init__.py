"""What any program needs: errors, files, locks, signals, child processes, console, progress."""
