"""Reports of a run: page, pictures, rows.csv, the comparison of two runs, the README's numbers."""
