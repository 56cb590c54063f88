"""From run folders to the page that answers whether attention helps, as HTML and as Markdown."""
