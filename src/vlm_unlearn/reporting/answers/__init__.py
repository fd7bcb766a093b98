"""Every answer of every model, as files become a page that searches and filters."""
