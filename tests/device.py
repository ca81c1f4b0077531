"""Where the tests' models, batches and samples lie; set by ``pytest --device``."""

NAME = "cpu"
