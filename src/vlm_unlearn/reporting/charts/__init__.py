"""Charts. Each is described once, then drawn with Plotly in pages and with matplotlib for papers."""
