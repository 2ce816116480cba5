"""The report: what it holds, in words and units, as a page and as a table."""
