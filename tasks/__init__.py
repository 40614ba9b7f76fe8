"""Units of work: plain functions, each with a `main()` that is one DVC stage."""
