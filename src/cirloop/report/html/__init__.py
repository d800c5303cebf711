"""`report.html`: what a run did, for people to look at."""

from cirloop.report.html.page import FILE, write
from cirloop.report.html.report_data import ReportData

__all__ = ["FILE", "ReportData", "write"]
