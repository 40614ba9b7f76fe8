"""Files of other programs, as arrays and affines; knows neither checks nor cohorts."""
