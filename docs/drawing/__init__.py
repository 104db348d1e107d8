"""What docs/figures.py draws with: a canvas, the numbers, and the figures by their subject."""
