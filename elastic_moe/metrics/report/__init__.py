"""A run as pictures: an HTML page, and one SVG of a run under kills. Standard library only."""
