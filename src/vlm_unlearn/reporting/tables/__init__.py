"""Tables of a report as CSV, LaTeX and Markdown. Their names are here, because importing this package is fast."""

TABLE_NAMES = (
    *("rates", "comparisons", "published", "labels", "categories", "rewrites", "cost"),
    *("safety_mirage", "safety_mirage_published", "safety_mirage_answers", "safe_eraser", "safe_eraser_published"),
)
DEPRECATED_TABLE_NAMES = {"shots": "rewrites"}  # names of the previous version, which are still accepted
PRINTABLE_TABLES = tuple(name for name in TABLE_NAMES if name != "cost")  # summary.json does not contain the costs
TABLE_FORMATS = ("csv", "tex", "md")
