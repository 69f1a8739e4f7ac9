"""A comparison as one HTML file that opens offline."""
