"""Turn folders of annotated scans into a checked cohort: layouts, checks, report."""
