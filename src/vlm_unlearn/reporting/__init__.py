"""Shows what was measured: the terminal table, the verdict in words, the HTML report."""
