"""`report.html`: what a run did, for people to look at."""

from cirloop.report.page import FILE, write
from cirloop.report.report_data import ReportData

__all__ = ["FILE", "ReportData", "write"]
