"""Where the package meets trainers, models and data: the only place besides the command that imports them."""
