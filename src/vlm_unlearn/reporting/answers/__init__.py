"""The page with every answer of every model, which searches and filters."""
