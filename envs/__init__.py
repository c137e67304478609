"""Ready environments. Each is an ordinary `Env` subclass: the framework knows nothing of any of them."""
