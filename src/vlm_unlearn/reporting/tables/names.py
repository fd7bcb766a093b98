"""What the tables are called, in a file of its own: the shell completes the names without what counts them."""

TABLE_NAMES = (
    *("rates", "comparisons", "published", "labels", "categories", "shots", "cost"),
    *("safety_mirage", "safety_mirage_published", "safety_mirage_answers", "safe_eraser", "safe_eraser_published"),
)
PRINTABLE_TABLES = tuple(
    name for name in TABLE_NAMES if name != "cost"
)  # what it takes stands in manifests and verdicts, which `report` reads
TABLE_FORMATS = ("csv", "tex", "md")
