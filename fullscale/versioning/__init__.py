"""Git and DVC: data versions, worktrees, provenance, retraining branches."""
