"""Charts: described once, drawn by Plotly in pages and by matplotlib for papers."""
