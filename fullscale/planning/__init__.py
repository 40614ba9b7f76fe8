"""Read parameters off a cohort and a machine: fingerprint, measured step, rules, params.yaml."""
