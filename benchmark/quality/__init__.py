"""What the formats cost in quality: see docs/quality.md."""
