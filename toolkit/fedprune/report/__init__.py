"""The one renderer of reports: data in, HTML with inline SVG out. Every wing draws its pages with it.

It knows no model, job or run: the caller gives the words and numbers to show.
"""
