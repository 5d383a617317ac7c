"""Each rule beside its node called row by row."""
