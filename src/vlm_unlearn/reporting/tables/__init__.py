"""Tables: described once, written as CSV, LaTeX and Markdown."""
