"""MLflow: runs, store and model registry."""
