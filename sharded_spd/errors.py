"""The package's own exceptions, each a `ValueError`/`TypeError`/`RuntimeError`, so that plain handlers catch them."""


class ConfigError(ValueError):
    """A configuration that cannot be honoured: an unknown key, a bad value, a pattern that matches nothing."""


class AnchorError(ValueError):
    """An anchor that does not fit the model: missing, extra, misshapen, truncated, or taken at the wrong time."""


class BindingError(RuntimeError):
    """Parameters that the projector is not, or no longer, bound to."""


class UnsupportedError(TypeError):
    """An optimizer, tensor or engine setting under which the method would be silently wrong."""
