"""Tables of a report as CSV, LaTeX and Markdown. Their names are here, because importing this package is fast."""

TABLE_NAMES = (
    *("rates", "comparisons", "published", "labels", "categories", "rewrites", "cost"),
    *("safety_mirage", "safety_mirage_published", "safety_mirage_answers", "safe_eraser", "safe_eraser_published"),
    *("worst_attacks", "robustness", "steps_to_half"),
)
DEPRECATED_TABLE_NAMES = {"shots": "rewrites"}  # names of the previous version, which are still accepted
# summary.json does not contain the costs and the results of attacks on the models.
NOT_IN_SUMMARY = ("cost", "worst_attacks", "robustness", "steps_to_half")
PRINTABLE_TABLES = tuple(name for name in TABLE_NAMES if name not in NOT_IN_SUMMARY)
TABLE_FORMATS = ("csv", "tex", "md")
