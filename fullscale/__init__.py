"""The `fullscale` command."""
