"""What the runtime refuses."""


class UnsupportedModel(ValueError):
    """A model that the runtime has no layers for, in one line."""
