"""Pages, tables, charts and model cards."""
