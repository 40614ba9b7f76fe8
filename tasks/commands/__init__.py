"""Commands of a person beside the stages: one file for each command of `fullscale`."""
