"""The command line: parse, call, print."""

from logitcache.cli.app import main

__all__ = ["main"]
