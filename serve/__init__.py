"""Floor 4: the HTTP service. Empty until the service lands; the import-order rule already covers it."""
