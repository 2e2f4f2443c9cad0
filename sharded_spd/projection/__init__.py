"""One step, from the gradient to the pulled weight."""
