"""Prefect flows: when the stages run. No science here."""
