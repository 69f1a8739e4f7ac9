"""What servers do at the moment, in a table that is drawn anew (docs/observability.md)."""
