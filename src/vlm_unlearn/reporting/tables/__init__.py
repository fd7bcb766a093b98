"""Tables. Each is described once, then written as CSV, LaTeX and Markdown."""
