"""`report.html`: what a run did, for people to look at."""

from cirloop.report.html.page import FILE, render, write
from cirloop.report.html.pictures import Thumbnails
from cirloop.report.html.source import Source

__all__ = ["FILE", "Source", "Thumbnails", "render", "write"]
