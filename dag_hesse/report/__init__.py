"""What the user gets: labelled arrays with methods and standard errors, text, files, plots."""

from dag_hesse.report.compare import Comparison
from dag_hesse.report.files import load
from dag_hesse.report.pairs import Pair, Reading
from dag_hesse.report.report import CurvatureReport
from dag_hesse.report.series import ReportSeries, concat

__all__ = ["Comparison", "CurvatureReport", "Pair", "Reading", "ReportSeries", "concat", "load"]
