"""What a run says: page, pictures, tables, the comparison of two runs, the README's numbers."""
