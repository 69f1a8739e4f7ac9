"""What servers that run say of their load, and what that says of a mix."""
