"""Charts. Each is described once and drawn with matplotlib, for the page and for papers."""
