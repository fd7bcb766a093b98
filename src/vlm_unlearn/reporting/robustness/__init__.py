"""Results of robustness runs in a report: how much an attack brings back, and how that changes the assessment."""
