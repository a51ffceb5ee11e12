"""mtpo: multi-turn preference learning for language models that do maths with a code interpreter."""

__version__ = "0.1.0"
