"""Where nodes come from: one file per provider, behind Ray's own `NodeProvider`."""
