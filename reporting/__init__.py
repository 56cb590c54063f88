"""Turn run folders into a report on whether attention helps, as HTML and as Markdown."""
