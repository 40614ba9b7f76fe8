"""Servers and worker of a project: settings, deployments, and the watcher of the inbox."""
