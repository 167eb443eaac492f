"""Independent answers that results are held against."""
