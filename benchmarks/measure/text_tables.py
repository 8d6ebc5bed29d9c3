"""Tables as text."""


def aligned(heads, rows, right=()):
    """Lines of columns separated by two spaces; ``right`` are the heads of right-aligned columns."""
    table = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    formats = [f"{'>' if head in right else '<'}{width}" for head, width in zip(heads, widths, strict=True)]
    return ["  ".join(map(format, row, formats)).rstrip() for row in table]


def markdown(heads, rows):
    """Lines of a Markdown table."""
    table = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in table]
