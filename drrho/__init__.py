"""drrho."""
