"""From what people have to a checked cohort: layouts, checks, report, inbox. No torch."""
