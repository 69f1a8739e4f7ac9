"""What a user is told in one line."""


class Problem(ValueError):
    """The flag, file or name, what is wrong with it, and what would be right."""
