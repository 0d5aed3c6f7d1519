"""Programs built on drrho; run from a checkout."""
