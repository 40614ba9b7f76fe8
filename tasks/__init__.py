"""Units of work: plain functions, each with a `main()` that is one DVC stage."""

import gc

# Importing torch and MLflow makes millions of objects that stay. To look for cycles among them
# after every 700 new ones, as Python does by default, takes a fifth of the time of the imports.
gc.set_threshold(20_000, 50, 100)
