"""One file per method: its equations as pure functions, its module, its configuration."""
