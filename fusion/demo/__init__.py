"""The built-in example of `fusion up`: a small GPT on English text that every CPython carries."""

from fusion.demo.files import write_demo

__all__ = ["write_demo"]
