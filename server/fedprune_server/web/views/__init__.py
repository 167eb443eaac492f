"""The console's pages: HTML from templates, numbers and times as people read them."""
