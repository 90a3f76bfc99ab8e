"""Training memory: arithmetic (`estimate`), instruments (`measure`)."""
