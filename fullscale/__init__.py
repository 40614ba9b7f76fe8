"""The library behind flows and tasks: settings at its root, everything else in packages."""
