"""The one renderer of reports: data in, HTML with inline SVG out. Every wing draws its pages with it.

It knows no model, job or run: whoever has one says in words and numbers what to show.
"""
